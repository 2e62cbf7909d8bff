"""The page at `/docs`, which describes the API: Swagger UI, from files of this machine."""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import FileResponse, Response

_PATH = "/docs"
_SCRIPT, _STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
DOCS_PATHS = (_PATH, f"{_PATH}/{_SCRIPT}", f"{_PATH}/{_STYLE}")
"""What the page consists of."""
# Like the other pages, with files of its own.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def add_docs(api: FastAPI, title: str, openapi_path: str) -> None:
    """Add the page and its files to an application whose description is at `openapi_path`."""
    directory = files("fastapi_offline") / "static"

    async def page(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        answer = get_swagger_ui_html(
            openapi_url=f"{root}{openapi_path}",
            title=title,
            swagger_js_url=f"{root}{_PATH}/{_SCRIPT}",
            swagger_css_url=f"{root}{_PATH}/{_STYLE}",
            swagger_favicon_url="data:,",
            swagger_ui_parameters={"validatorUrl": None, "persistAuthorization": True},
        )
        answer.headers.update(_HEADERS)
        return answer

    async def file(request: Request) -> Response:
        name = request.scope["path"].rpartition("/")[2]
        return FileResponse(str(directory / name), headers={"Cache-Control": "max-age=86400"})

    api.add_route(_PATH, page, include_in_schema=False)
    for path in DOCS_PATHS[1:]:
        api.add_route(path, file, include_in_schema=False)
