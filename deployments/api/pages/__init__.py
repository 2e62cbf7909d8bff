"""The pages that people see: chat at `/`, the fleet at `/fleet`. Each is one file and asks no other server."""

from pathlib import Path

from starlette.responses import Response

# Nothing from elsewhere, nothing to elsewhere; scripts and styles are the page's own.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page(name: str) -> Response:
    """One of the pages, "chat" or "fleet"."""
    html = (Path(__file__).parent / f"{name}.html").read_bytes()
    return Response(html, media_type="text/html", headers=_HEADERS)
