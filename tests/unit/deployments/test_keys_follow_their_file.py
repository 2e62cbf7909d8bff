"""Keys come and go with their file, without a restart, over HTTP without a socket."""

import asyncio
import hashlib
import os
import re
from pathlib import Path

import pytest
import yaml
from in_process import Service, ServiceFactory, emulated_config

from deployments.config import AppConfig
from deployments.router.access import Access
from deployments.router.key_file import KeyFile
from deployments.router.keys import ApiKey, KeySource, find_keys, parse_keys
from llm.errors import ConfigError

FIRST, SECOND = "sk-first-secret", "sk-second-secret"


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def entry(name: str, secret: str, **limits: int) -> dict:
    return {"name": name, "key_sha256": sha256(secret), **limits}


def write(path: Path, *entries: dict) -> None:
    path.write_text(yaml.safe_dump(list(entries)))


def config_with(path: Path, **changes: object) -> AppConfig:
    return emulated_config(api_keys_file=str(path), emulation={"tokens_per_s": 20.0, "max_seq_len": 2048}, **changes)


async def ask(service: Service, secret: str, **fields):
    body = {"model": "demo", "prompt": "a", "max_tokens": 1, **fields}
    return await service.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {secret}"})


async def until(condition, timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def changed(service: Service, num_changes: int) -> None:
    await until(lambda: service.directory.access.snapshot()["num_key_changes"] == num_changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    write(path, entry("first", FIRST))
    return path


async def make(make_service: ServiceFactory, path: Path, **changes: object) -> Service:
    config = config_with(path, **changes)
    return await make_service(config, access=Access(find_keys(config)))


async def test_a_key_is_added_and_revoked_without_a_restart(make_service: ServiceFactory, path: Path, serve_log):
    service = await make(make_service, path)
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [200, 401]
    write(path, entry("first", FIRST), entry("second", SECOND))
    await changed(service, 1)
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [200, 200]
    write(path, entry("second", SECOND))
    await changed(service, 2)
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [401, 200]
    assert any("revoked: first" in record.getMessage() for record in serve_log)


async def test_a_plain_file_is_followed_too(make_service: ServiceFactory, tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"{FIRST}\n")
    service = await make(make_service, path)
    path.write_text(f"{SECOND}\n")
    await changed(service, 1)
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [401, 200]


async def test_a_mounted_secret_is_replaced_by_its_links(make_service: ServiceFactory, tmp_path: Path):
    """As Kubernetes does: keys.yaml -> ..data/keys.yaml, ..data -> a directory for each version."""
    for version, secret in (("v1", FIRST), ("v2", SECOND)):
        (tmp_path / version).mkdir()
        write(tmp_path / version / "keys.yaml", entry("team", secret))
        os.utime(tmp_path / version / "keys.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    service = await make(make_service, tmp_path / "keys.yaml")
    assert (await ask(service, FIRST)).status_code == 200
    (tmp_path / "..new").symlink_to("v2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    await changed(service, 1)
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [401, 200]


@pytest.mark.parametrize("content", [b"- {name: first, key: [", b"", b"[]", b"\xff\xfe", b"- sk-second-secret", None])
async def test_a_broken_file_changes_no_key_and_is_told_once(
    make_service: ServiceFactory, path: Path, content: bytes | None, serve_log
):
    service = await make(make_service, path)
    path.unlink() if content is None else path.write_bytes(content)
    await until(lambda: service.directory.access.snapshot()["is_key_file_wrong"])
    metrics = await service.http.get("/metrics", headers={"x-api-key": FIRST})
    assert re.search(r"^rayline:api_keys_file_wrong{.*} 1.0$", metrics.text, re.M)
    assert (await ask(service, FIRST)).status_code == 200
    for _ in range(3):
        service.directory.access._file.look()
    told = [record.getMessage() for record in serve_log if "api_keys_file" in record.getMessage()]
    assert len(told) == 1
    assert "sk-" not in told[0]
    write(path, entry("second", SECOND))
    await changed(service, 1)
    assert not service.directory.access.snapshot()["is_key_file_wrong"]
    assert [(await ask(service, secret)).status_code for secret in (FIRST, SECOND)] == [401, 200]


def test_a_file_that_is_being_written_revokes_nothing(path: Path):
    write(path, entry("first", FIRST), entry("second", SECOND))
    source = find_keys(AppConfig(api_keys_file=str(path)))
    file = KeyFile(source)
    file.look(is_first=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"- key", 1)])
    assert file.look() is None
    path.write_bytes(whole)
    assert file.look() is None
    assert file.look() is None
    assert len(file.keys) == 2
    write(path, entry("second", SECOND))
    assert file.look() is None
    assert [key.name for key in file.look() or ()] == ["second"]


def test_a_router_that_cannot_read_the_file_uses_the_keys_of_the_deployment(path: Path, tmp_path: Path):
    source = find_keys(AppConfig(api_keys_file=str(path)))
    elsewhere = KeySource(source.fixed, source.from_file, str(tmp_path / "nowhere" / "keys.yaml"))
    file = KeyFile(elsewhere)
    assert file.look(is_first=True) is None
    assert file.error is not None
    assert [key.name for key in file.keys] == ["first"]


def test_a_router_that_starts_takes_the_file_before_the_keys_of_the_deployment(path: Path):
    source = find_keys(AppConfig(api_keys_file=str(path)))
    write(path, entry("second", SECOND))
    assert [key.name for key in KeyFile(source).look(is_first=True) or ()] == ["second"]


async def test_open_streams_of_a_revoked_key_end_with_an_error(make_service: ServiceFactory, path: Path):
    write(path, entry("first", FIRST), entry("second", SECOND))
    service = await make(make_service, path)
    long = {"max_tokens": 1500, "ignore_eos": True}
    asking = [
        asyncio.ensure_future(ask(service, FIRST, stream=True, **long)),
        asyncio.ensure_future(ask(service, FIRST, **long)),
    ]
    other = asyncio.ensure_future(ask(service, SECOND, max_tokens=60, ignore_eos=True))
    await until(lambda: service.router.journal.num_live == 3)
    write(path, entry("second", SECOND))
    stream, whole = await asyncio.wait_for(asyncio.gather(*asking), 10)
    assert '"code":"invalid_api_key"' in stream.text
    assert "revoked" in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert (whole.status_code, whole.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await other).json()["usage"]["completion_tokens"] == 60, "streams of other keys go on"
    await until(lambda: service.num_used_pages == 0)


async def test_another_secret_under_the_same_name_ends_what_the_old_one_began(make_service: ServiceFactory, path: Path):
    service = await make(make_service, path)
    old = asyncio.ensure_future(ask(service, FIRST, max_tokens=1500, ignore_eos=True))
    await until(lambda: service.router.journal.num_live == 1)
    write(path, entry("first", SECOND))
    assert (await asyncio.wait_for(old, 10)).status_code == 401
    assert (await ask(service, SECOND)).status_code == 200


async def test_limits_change_without_losing_what_was_used(make_service: ServiceFactory, path: Path):
    write(path, entry("first", FIRST, requests_per_min=2))
    service = await make(make_service, path)
    assert [(await ask(service, FIRST)).status_code for _ in range(3)] == [200, 200, 429]
    write(path, entry("first", FIRST, requests_per_min=3))
    await changed(service, 1)
    assert [(await ask(service, FIRST)).status_code for _ in range(2)] == [200, 429]
    write(path, entry("first", FIRST))
    await changed(service, 2)
    assert [(await ask(service, FIRST)).status_code for _ in range(3)] == [200, 200, 200]


@pytest.mark.parametrize(
    "content",
    [
        "- sk-secret",
        "sk-secret: 1",
        "- {sk-secret: 1}",
        "- {name: a, sk-secret: b}",
        "- {name: a, key: sk-secret, requests_per_min: sk-secret}",
        "- {name: a, key_sha256: sk-secret}",
        "- {name: a, key: sk-secret",
        "- {name: a, key: sk-secret}\n- {name: a, key: sk-secret-2}",
        "- {name: a, key: sk-secret}\n- {name: b, key: sk-secret}",
        "&sk-secret [*sk-secret-2]",
    ],
)
def test_no_error_repeats_what_is_in_the_file(content: str):
    with pytest.raises(ConfigError) as raised:
        parse_keys(Path("keys.yaml"), content.encode(), AppConfig().limits.per_key)
    error: BaseException | None = raised.value
    assert "sk-secret" not in str(error)
    assert error.__cause__ is None


async def test_many_keys_cost_a_request_and_a_change_nothing():
    """A router finds a key at once, however many there are, and a change touches only keys that are in use."""
    keys = tuple(ApiKey(f"team-{i}", hashlib.sha256(str(i).encode()).digest()) for i in range(5000))
    access = Access(KeySource(fixed=keys))
    access.account(keys[3])
    assert access.with_secret(b"3") is access.named("team-3") is keys[3]
    assert access.with_secret(b"x") is access.named("x") is None
    access.change_keys(keys[4:])
    assert [access.with_secret(secret) for secret in (b"3", b"4")] == [None, keys[4]]
    assert access.named("team-3") is None
    opened = [key.name for key in keys if access._quotas.opened(key.name) is not None]
    assert opened == ["team-3"], "5,000 accounts would hold up the event loop"
    access.close()
