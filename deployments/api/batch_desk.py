"""What the handlers of files and batches share: the desk, or why there is none, and its errors in HTTP's terms."""

from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from deployments.batches.desk import BatchDesk
from deployments.batches.errors import BatchRefusedError, BatchStoreAwayError, RefusalKind
from deployments.batches.file_shelf import Page
from deployments.chat.errors import SERVER_ERROR, APIError, invalid

T = TypeVar("T")

_STATUSES = {
    RefusalKind.NOT_FOUND: 404,
    RefusalKind.CONFLICT: 409,
    RefusalKind.INVALID: 400,
    RefusalKind.TOO_LARGE: 413,
    RefusalKind.TOO_MANY: 429,
}


class DeskAccess:
    """The desk as handlers use it.

    Args:
        desk: None if the configuration asks for none.
    """

    def __init__(self, desk: BatchDesk | None) -> None:
        self._desk = desk

    @property
    def desk(self) -> BatchDesk:
        """The desk.

        Raises:
            APIError: a 404; there is none.
        """
        if self._desk is None:
            raise APIError(
                404, "This server keeps no files and runs no batches; set batches.store in its configuration to a "
                "directory or a URL such as s3://bucket/folder", code="batches_off",
            )  # fmt: skip
        return self._desk

    async def run(self, work: Callable[[], T]) -> T:
        """Do what reads or writes the store.

        Raises:
            APIError: it is refused, or the store cannot be reached.
        """
        try:
            return await self.desk.run(work)
        except BatchRefusedError as error:
            # The rest of a body that is too large is still arriving, so the connection cannot be reused.
            headers = {"Connection": "close"} if error.kind is RefusalKind.TOO_LARGE else {}
            headers |= {"Retry-After": "60"} if error.kind is RefusalKind.TOO_MANY else {}
            raise APIError(
                _STATUSES[error.kind], str(error), param=error.param, code=error.code, headers=headers
            ) from None
        except BatchStoreAwayError as error:
            raise APIError(
                503, str(error), type=SERVER_ERROR, code="store_unavailable", headers={"Retry-After": "5"}
            ) from None


def page_of(request: Request, is_id: Callable[[str], bool], *, default: int, most: int, order: str = "desc") -> Page:
    """The page that a request's `limit`, `after` and `order` ask for.

    Args:
        request: the HTTP request.
        is_id: whether a text looks like the id of an entry.
        default: entries of a page if the request does not say.
        most: most entries of a page.
        order: "asc" or "desc", if the request does not say.

    Raises:
        APIError: a 400.
    """
    query = request.query_params
    limit, order = query.get("limit", str(default)), query.get("order", order)
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= most):
        raise invalid(f"limit: must be a number from 1 to {most}", "limit")
    if order not in ("asc", "desc"):
        raise invalid("order: must be asc or desc", "order")
    after = query.get("after") or None
    if after is not None and not is_id(after):
        raise invalid("after: must be the id of the last entry of the page before", "after")
    return Page(int(limit), after, is_ascending=order == "asc")


def list_object(entries: list[dict[str, object]], *, has_more: bool) -> dict[str, object]:
    """A page of a list."""
    ids = [entry["id"] for entry in entries]
    return {
        "object": "list", "data": entries, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }  # fmt: skip
