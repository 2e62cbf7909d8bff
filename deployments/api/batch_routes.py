"""The handlers for `/v1/batches`."""

from collections.abc import Callable, Collection

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.answering import json_response
from deployments.api.batch_desk import DeskAccess, list_object, page_of
from deployments.api.bodies import parse, read_body
from deployments.api.callers import tenant_of
from deployments.api.openai.batches import BatchList, BatchObject, BatchRequest, batch_object
from deployments.api.route_table import Route
from deployments.batches.desk import BatchDesk
from deployments.batches.ledger import BatchLedger
from deployments.batches.records import Batch, is_batch_id
from deployments.chat.errors import invalid
from deployments.config import LimitsConfig

BATCHED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
)
"""Paths whose requests batches may hold, if they are served."""
_ONE = "/v1/batches/{batch_id}"
_DEFAULT_PAGE, _MAX_PAGE = 20, 100


class BatchEndpoints:
    """Makes, lists and cancels the batches of each API key.

    Args:
        desk: where they are kept; None for nowhere.
        limits: bounds on what clients may do.
        paths: paths that are served.
    """

    def __init__(self, desk: BatchDesk | None, limits: LimitsConfig, paths: Collection[str]) -> None:
        self._access = DeskAccess(desk)
        self._limits = limits
        self._paths = tuple(path for path in BATCHED_PATHS if path in paths)

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("POST", "/v1/batches", self.create, "Run the requests of a file", BatchObject, BatchRequest),
            Route("GET", "/v1/batches", self.list_batches, "Batches", BatchList),
            Route("GET", _ONE, self.read, "A batch", BatchObject),
            Route("POST", f"{_ONE}/cancel", self.cancel, "Cancel a batch", BatchObject),
        ]

    async def create(self, request: Request) -> Response:
        """Begin a batch: the requests of a file are run in whatever capacity is idle."""
        desk, owner = self._access.desk, tenant_of(request)
        body, _ = parse(BatchRequest, await read_body(request, self._limits))
        if body.endpoint not in self._paths:
            raise invalid(f"endpoint: must be one of {', '.join(self._paths)}", "endpoint")
        expires = body.output_expires_after
        batch = await self._access.run(
            lambda: desk.ledger.create(
                owner,
                input_file_id=body.input_file_id,
                endpoint=body.endpoint,
                completion_window=body.completion_window,
                metadata=body.metadata,
                results_expire_after_s=expires.seconds if expires is not None else None,
            )
        )
        desk.changed.set()
        return json_response(batch_object(batch))

    async def list_batches(self, request: Request) -> Response:
        """List batches, the newest first."""
        page, owner = page_of(request, is_batch_id, default=_DEFAULT_PAGE, most=_MAX_PAGE), tenant_of(request)
        ledger = self._access.desk.ledger
        batches, has_more = await self._access.run(lambda: ledger.page(owner, page))
        return json_response(list_object([batch_object(batch) for batch in batches], has_more=has_more))

    async def read(self, request: Request) -> Response:
        """Describe a batch."""
        return await self._with(request, BatchLedger.get)

    async def cancel(self, request: Request) -> Response:
        """End a batch. Lines that are running are given up; what is done by then can be read."""
        answer = await self._with(request, BatchLedger.cancel)
        self._access.desk.changed.set()
        return answer

    async def _with(self, request: Request, do: Callable[[BatchLedger, str, str], Batch]) -> Response:
        owner, batch_id = tenant_of(request), request.path_params["batch_id"]
        ledger = self._access.desk.ledger
        return json_response(batch_object(await self._access.run(lambda: do(ledger, owner, batch_id))))
