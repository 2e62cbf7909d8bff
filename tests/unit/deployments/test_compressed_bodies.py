"""Bodies that come compressed: the same answers, and no more memory than the limit allows."""

import gzip
import json
import tracemalloc
import zlib

import pytest
from in_process import ServiceFactory, emulated_config

from deployments.api.inflate import MAX_MEMBERS, InflateError, TooLargeError, inflate

BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()


def bare(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("identity", BODY),
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("GZip", gzip.compress(BODY[:20], mtime=0) + gzip.compress(BODY[20:], mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", bare(BODY)),
    ],
)
async def test_compressed_bodies_are_read(make_service: ServiceFactory, encoding: str, data: bytes):
    service = await make_service()
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = await service.http.post("/v1/chat/completions", content=data, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("encoding", "data", "status"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400),
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("deflate", BODY, 400),
        ("gzip", gzip.compress(bytes(1 << 20), mtime=0), 413),
        ("gzip", gzip.compress(BODY, mtime=0) + gzip.compress(b" " * (1 << 20), mtime=0), 413),
        ("br", BODY, 415),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY, mtime=0), mtime=0), 415),
    ],
)
async def test_what_cannot_be_read_is_refused(make_service: ServiceFactory, encoding: str, data: bytes, status: int):
    service = await make_service(emulated_config(limits={"max_body_bytes": 1 << 16}))
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = await service.http.post("/v1/chat/completions", content=data, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_bomb_takes_no_more_than_the_limit():
    """A thousand bytes out of each byte in."""
    bomb = gzip.compress(bytes(200 << 20), compresslevel=9, mtime=0)
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError):
            inflate(bomb, "gzip", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b",
        gzip.compress(b"a", mtime=0)[:-1],
        gzip.compress(b"a", mtime=0) + b"rest",
        gzip.compress(b"", mtime=0) * (MAX_MEMBERS + 1),
    ],
)
def test_what_is_no_gzip_is_refused(data: bytes):
    with pytest.raises(InflateError):
        inflate(data, "gzip", 1000)
