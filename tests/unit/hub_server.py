"""A server on 127.0.0.1 that answers as the Hugging Face Hub does, for one repository in one revision."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repository: str, directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a directory's files; yields the address, and the names of the files that were sent, in order."""
    sent: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{repository}", f"/api/models/{repository}/revision/{REVISION}"):
                names = sorted(file.name for file in directory.iterdir())
                info = {"id": repository, "sha": REVISION, "siblings": [{"rfilename": name} for name in names]}
                self._answer(json.dumps(info).encode(), {"content-type": "application/json"})
                return
            if path == f"/api/models/{repository}/tree/{REVISION}":
                files = [
                    {"type": "file", "path": file.name, "oid": REVISION, "size": file.stat().st_size}
                    for file in sorted(directory.iterdir())
                ]
                self._answer(json.dumps(files).encode(), {"content-type": "application/json"})
                return
            name = path.removeprefix(f"/{repository}/resolve/{REVISION}/")
            if not (directory / name).is_file():
                self._answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)
                return
            content = (directory / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            if self.command == "GET":
                sent.append(name)
            self._answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "accept-ranges": "bytes"})

        do_HEAD = do_GET  # noqa: N815 - the base class's name

        def _answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
