"""The pages that people see: chat at `/`, the fleet at `/fleet`, the API at `/docs`. None of them loads anything from
other servers."""

from pathlib import Path

from starlette.responses import Response

STATIC_PATH = "/static"
"""Path under which the pages' files are served."""
STATIC_DIRECTORY = Path(__file__).parent / "static"

# Nothing is loaded from or sent to other servers; scripts and styles are in separate files.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "font-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page(name: str) -> Response:
    """One of the pages: "chat", "fleet" or "docs"."""
    html = (Path(__file__).parent / f"{name}.html").read_bytes()
    return Response(html, media_type="text/html", headers=_HEADERS)
