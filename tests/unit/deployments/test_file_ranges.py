"""Parts of a file's content: downloads that go on where they broke off, and readers that want only an end."""

from pathlib import Path

import pytest
from in_process import Service, ServiceFactory, emulated_config

CONTENT = bytes(range(48, 58)) * 5


async def uploaded(make_service: ServiceFactory, tmp_path: Path) -> tuple[Service, str]:
    service = await make_service(emulated_config(batches={"store": str(tmp_path / "store")}))
    answer = await service.http.post("/v1/files", files={"file": ("a.jsonl", CONTENT)}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    return service, f"/v1/files/{answer.json()['id']}/content"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-9", 0, 9), ("bytes=10-", 10, 49), ("bytes=-7", 43, 49), ("bytes=40-400", 40, 49), ("bytes=-90", 0, 49),
     ("BYTES = 3-3", 3, 3)],
)  # fmt: skip
async def test_a_part_is_206(make_service: ServiceFactory, tmp_path: Path, asked: str, first: int, last: int):
    service, path = await uploaded(make_service, tmp_path)
    part = await service.http.get(path, headers={"Range": asked})
    assert part.status_code == 206
    assert part.content == CONTENT[first : last + 1]
    assert part.headers["content-range"] == f"bytes {first}-{last}/50"
    assert part.headers["content-length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes=50-", "bytes=90-99", "bytes=-0"])
async def test_a_part_that_is_not_there_is_416(make_service: ServiceFactory, tmp_path: Path, asked: str):
    service, path = await uploaded(make_service, tmp_path)
    answer = await service.http.get(path, headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == "bytes */50"
    assert "50 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("asked", [None, "bytes=9-3", "bytes=a-b", "lines=1-2", "bytes=0-1,3-4", "bytes=", "bytes=-",
                                   "bytes=" + "9" * 5000 + "-", "bytes=٣-"])  # fmt: skip
async def test_otherwise_the_whole_is_sent(make_service: ServiceFactory, tmp_path: Path, asked: str | None):
    """RFC 9110, section 14.2: a range that cannot be read, or a form that is not supported, is ignored."""
    service, path = await uploaded(make_service, tmp_path)
    answer = await service.http.get(path, headers={"Range": asked.encode()} if asked is not None else {})
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["accept-ranges"] == "bytes"


async def test_a_part_only_of_the_same_file(make_service: ServiceFactory, tmp_path: Path):
    service, path = await uploaded(make_service, tmp_path)
    tag = (await service.http.head(path)).headers["etag"]
    same = await service.http.get(path, headers={"Range": "bytes=0-1", "If-Range": tag})
    other = await service.http.get(path, headers={"Range": "bytes=0-1", "If-Range": '"another"'})
    assert (same.status_code, other.status_code) == (206, 200)
    assert (await service.http.head(path, headers={"Range": "bytes=0-1"})).status_code == 200
