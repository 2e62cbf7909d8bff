"""The pages that people see: chat at `/`, the fleet at `/fleet`, the API at `/docs`. None loads from other servers."""

from pathlib import Path

from starlette.responses import Response

STATIC_PATH = "/static"
"""Where the files are that pages load."""
STATIC_DIRECTORY = Path(__file__).parent / "static"

# Nothing from elsewhere, nothing to elsewhere; scripts and styles come in files of their own.
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
# Pages whose scripts and styles are not in files of their own yet.
_INLINE = {name: {"script_src": "'unsafe-inline'", "style_src": "'unsafe-inline'"} for name in ("chat",)}


def page_headers(**policy: str) -> dict[str, str]:
    """The headers of a page: what the browser may load for it and run, and what it tells others about it.

    Args:
        policy: content-security policy to add or to put in place of the usual one, by directive, with `_` for `-`.
    """
    directives = _POLICY | {name.replace("_", "-"): sources for name, sources in policy.items()}
    return {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in directives.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def page(name: str) -> Response:
    """One of the pages: "chat", "fleet" or "docs"."""
    html = (Path(__file__).parent / f"{name}.html").read_bytes()
    return Response(html, media_type="text/html", headers=page_headers(**_INLINE.get(name, {})))
