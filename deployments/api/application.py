"""The HTTP application of a router: its routes, and the middleware around them."""

from collections.abc import Awaitable, Callable, Sequence

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from deployments.api.answer_headers import IGNORED_HEADER
from deployments.api.audit import Audit
from deployments.api.auth import KeyGuard
from deployments.api.callers import REQUEST_ID_HEADER, TIMING_HEADER
from deployments.api.edge import Edge
from deployments.api.errors import answer_to, wrong_method
from deployments.api.openai.response_store import ResponseStore
from deployments.api.pages import STATIC_DIRECTORY, STATIC_PATH
from deployments.api.pages.static_files import add_static_files
from deployments.api.route_table import EVENT_STREAM, Route, describe
from deployments.api.routes import Endpoints
from deployments.api.tracing import TraceRequests
from deployments.api.wrong_paths import WrongPaths
from deployments.api_config import CorsConfig
from deployments.batches.desk import BatchDesk
from deployments.chat.errors import APIError, of_engine
from deployments.router.accounts import LIMIT_HEADERS
from deployments.router.directory import ModelDirectory
from deployments.version import __version__
from llm.errors import LLMError

TITLE = "Rayline"
_OPENAPI_PATH = "/openapi.json"


def create_api(directory: ModelDirectory, store: ResponseStore | None = None, desk: BatchDesk | None = None) -> FastAPI:
    """Create the HTTP application of a router; it asks for the router's keys.

    Args:
        directory: the models, which generate the answers.
        store: where responses are kept; None for nowhere.
        desk: where files and batches are kept; None for nowhere.

    Raises:
        CheckpointError, ConfigError: a tokenizer cannot be loaded; one line with the fix.
    """
    config = directory.platform
    table = Endpoints(directory, store, desk).table()
    api = FastAPI(
        title=TITLE, version=__version__, openapi_url=_OPENAPI_PATH, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    _add_routes(api, table)
    static_paths = add_static_files(api, STATIC_PATH, STATIC_DIRECTORY)
    api.openapi = lambda: describe(api, table, needs_key=directory.access.needs_key)  # type: ignore[method-assign]
    api.add_exception_handler(APIError, _on_api_error)
    api.add_exception_handler(LLMError, _on_llm_error)
    api.add_exception_handler(HTTPException, _http_errors(WrongPaths(table)))
    open_paths = [*(route.path for route in table if route.is_open), _OPENAPI_PATH, *static_paths]
    metered_paths = [route.path for route in table if route.is_metered]
    # The last one added is the outermost.
    api.add_middleware(KeyGuard, access=directory.access, open_paths=open_paths, metered_paths=metered_paths)
    api.add_middleware(Edge, limits=config.limits, max_open_requests=config.router.max_ongoing_requests)
    api.add_middleware(Audit, access=directory.access, table=table, open_paths=open_paths, metered_paths=metered_paths)
    if config.cors.is_on:
        _add_cors(api, config.cors)
    if directory.tracer is not None:
        api.add_middleware(TraceRequests, tracer=directory.tracer)
    return api


def _add_routes(api: FastAPI, table: Sequence[Route]) -> None:
    """Add the table's routes. A route that answers GET answers HEAD too, unless its answer is endless."""
    for route in table:
        api.add_api_route(
            route.path, route.handler, methods=[route.method], summary=route.summary, response_model=None,
            description=route.handler.__doc__, openapi_extra=route.operation(), response_class=Response,
        )  # fmt: skip
        if route.method == "GET" and route.answer != EVENT_STREAM:
            api.router.add_route(route.path, route.handler, methods=["HEAD"], include_in_schema=False)


def _add_cors(api: FastAPI, cors: CorsConfig) -> None:
    """Let pages of other origins use the API. This goes outside `KeyGuard`: a browser's preflight has no key."""
    api.add_middleware(
        CORSMiddleware,
        allow_origins=cors.allow_origins,
        allow_origin_regex=cors.allow_origin_regex,
        allow_methods=["GET", "HEAD", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER, TIMING_HEADER, IGNORED_HEADER, "Retry-After", *LIMIT_HEADERS],
        max_age=cors.max_age_s,
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError), "registered for it"
    return answer_to(request.scope, error)


async def _on_llm_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LLMError), "registered for it"
    return answer_to(request.scope, of_engine(error))


def _http_errors(wrong_paths: WrongPaths) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Answers requests that Starlette itself refuses."""

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        match error.status_code:
            case 404:
                told = wrong_paths.not_found(request)
            case 405:
                told = wrong_method((error.headers or {}).get("Allow", ""))
            case status:
                told = APIError(status, str(error.detail), headers=error.headers)
        return answer_to(request.scope, told)

    return answer
