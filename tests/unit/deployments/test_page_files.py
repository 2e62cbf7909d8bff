"""The pages' files: how they are served. What the pages do is tested in a browser (tests/e2e)."""

import gzip
import hashlib
import json
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from in_process import ServiceFactory

from deployments.api.pages import STATIC_DIRECTORY
from deployments.api.pages.static_files import add_static_files
from deployments.router.keys import ApiKey

VENDORED = STATIC_DIRECTORY / "vendor"
KEYS = (ApiKey("team", hashlib.sha256(b"key").digest()),)


async def test_every_file_is_served_without_a_key_and_as_what_it_is(make_service: ServiceFactory):
    service = await make_service(keys=KEYS)
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".woff2": "font/woff2",
             ".json": "application/json", ".txt": "text/plain"}  # fmt: skip
    files = [file for file in STATIC_DIRECTORY.rglob("*") if file.is_file()]
    assert files
    for file in files:
        answer = await service.http.get(f"/static/{file.relative_to(STATIC_DIRECTORY)}")
        assert answer.content == file.read_bytes(), file
        assert answer.headers["content-type"].partition(";")[0] == types[file.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_file_that_has_not_changed_is_not_sent_again(make_service: ServiceFactory):
    service = await make_service()
    first = await service.http.get("/static/theme.js")
    assert first.headers["cache-control"] == "no-cache", "a new version's pages find its files"
    again = await service.http.get("/static/theme.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    other = await service.http.get("/static/theme.js", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200
    head = await service.http.head("/static/theme.js")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/javascript")


async def test_files_are_compressed_for_who_asks(make_service: ServiceFactory):
    service = await make_service()
    async with service.http.stream("GET", "/static/theme.js", headers={"Accept-Encoding": "gzip"}) as answer:
        sent = b"".join([part async for part in answer.aiter_raw()])
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(sent) == (STATIC_DIRECTORY / "theme.js").read_bytes()
    plain = await service.http.get("/static/theme.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


@pytest.mark.parametrize("path", ["/static/other.js", "/static", "/static/../chat.html", "/static/%2e%2e/chat.html"])
async def test_nothing_else_is_served(make_service: ServiceFactory, path: str):
    answer = await (await make_service()).http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_file_of_unknown_kind_is_refused_at_start(tmp_path: Path):
    (tmp_path / "page.exe").write_bytes(b"")
    with pytest.raises(ValueError, match=r"page\.exe: no media type"):
        add_static_files(FastAPI(), "/static", tmp_path)


async def test_libraries_may_be_kept_for_ever(make_service: ServiceFactory):
    """Their version is a part of their path."""
    service = await make_service()
    libraries = json.loads((VENDORED / "manifest.json").read_text())
    for library in libraries:
        for name in library["files"]:
            assert f"-{library['version']}/" in name
    kept = await service.http.get(f"/static/vendor/{name}")
    assert kept.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_libraries_are_those_of_the_manifest():
    """Each file of a library is the published one, byte for byte, and its licence lies beside it."""
    libraries = json.loads((VENDORED / "manifest.json").read_text())
    written = {name: digest for library in libraries for name, digest in library["files"].items()}
    found = {
        file.relative_to(VENDORED).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in VENDORED.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert found == written
    for library in libraries:
        assert all(library[key] for key in ("package", "version", "licence", "purpose"))
        assert any(name.endswith("/LICENSE.txt") for name in library["files"]), library["package"]


@pytest.mark.parametrize("path", ["/", "/fleet", "/docs"])
async def test_a_page_may_run_and_load_its_own_files_alone(make_service: ServiceFactory, path: str):
    answer = await (await make_service()).http.get(path)
    policy = dict(line.split(" ", 1) for line in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["font-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert "//" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"


class _Page(HTMLParser):
    """What a page loads, and whatever in it the policy keeps from working."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.refused: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src" or (tag == "link" and name == "href"):
                self.loaded.append(value or "")
            if name == "style" or name.startswith("on"):
                self.refused.append(f"<{tag} {name}>")
        if tag == "style" or (tag == "script" and "src" not in dict(attrs)):
            self.refused.append(f"<{tag}>")


@pytest.mark.parametrize("path", ["/", "/fleet", "/docs"])
async def test_what_a_page_loads_is_there(make_service: ServiceFactory, path: str):
    """By a relative address, since a server may be behind a prefix; and so are the modules that its modules import."""
    service = await make_service()
    page = _Page()
    page.feed((await service.http.get(path)).text)
    assert page.refused == []
    assert page.loaded
    seen: set[str] = set()
    asked = [posixpath.join("/", address) for address in page.loaded]
    while asked:
        address = asked.pop()
        if address in seen:
            continue
        seen.add(address)
        answer = await service.http.get(address)
        assert answer.status_code == 200, address
        if address.endswith(".js") and "/vendor/" not in address:
            imported = re.findall(r"""(?:from|import)[ (]"([^"]+)";?\)?""", answer.text)
            asked += [posixpath.normpath(posixpath.join(posixpath.dirname(address), name)) for name in imported]
    if path == "/":
        assert any("/vendor/katex" in address and address.endswith(".js") for address in seen), "nothing was followed"
