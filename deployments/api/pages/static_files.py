"""Files that the pages load: scripts, styles and fonts, stored next to the pages and served only by this server."""

import gzip
import hashlib
from asyncio import to_thread
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}
_COMPRESSED = frozenset({".png", ".woff2"})
_VENDORED = "vendor/"
_FOR_EVER = "public, max-age=31536000, immutable"
_ASK_EACH_TIME = "no-cache"


@dataclass(frozen=True, slots=True)
class _Content:
    """A file as it is served."""

    body: bytes
    gzipped: bytes | None
    """The same, compressed; None if compression gains nothing."""
    etag: str


def add_static_files(api: Starlette, path: str, directory: Path) -> list[str]:
    """Serve the files below a directory; a client that asks for one again is told if it has not changed.

    Browsers may cache files in `vendor/` without asking again, because their paths include the version.

    Args:
        api: gets one route, for GET and HEAD.
        path: the path under which they are served, such as "/static". Pages use it without the leading slash, because a
            server may be behind a prefix.
        directory: where they are stored. They are listed now; each is read when it is first requested.

    Returns:
        The path of each file.

    Raises:
        ValueError: the media type of a file's kind is not known.
    """
    found = {file.relative_to(directory).as_posix(): file for file in sorted(directory.rglob("*")) if file.is_file()}
    for name, file in found.items():
        if file.suffix not in _MEDIA_TYPES:
            raise ValueError(f"{file}: no media type is known for {file.suffix or name}")

    async def answer(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in found:
            raise HTTPException(404)
        content = await to_thread(_read, found[name])
        return _response(request, name, found[name].suffix, content)

    api.router.add_route(f"{path}/{{name:path}}", answer, methods=["GET"], include_in_schema=False)
    return [f"{path}/{name}" for name in found]


@lru_cache(maxsize=256)
def _read(file: Path) -> _Content:
    body = file.read_bytes()
    gzipped = None if file.suffix in _COMPRESSED else gzip.compress(body, mtime=0)
    if gzipped is not None and len(gzipped) >= len(body):
        gzipped = None
    return _Content(body, gzipped, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _response(request: Request, name: str, suffix: str, content: _Content) -> Response:
    headers = {
        "Cache-Control": _FOR_EVER if name.startswith(_VENDORED) else _ASK_EACH_TIME,
        "ETag": content.etag,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    known = request.headers.get("if-none-match", "")
    if content.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    body = content.body
    if content.gzipped is not None and "gzip" in request.headers.get("accept-encoding", ""):
        body = content.gzipped
        headers["Content-Encoding"] = "gzip"
    return Response(body, media_type=_MEDIA_TYPES[suffix], headers=headers)
