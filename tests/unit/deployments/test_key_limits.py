"""What a key may ask for, and how long a client may take, over HTTP without a socket."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory, emulated_config

from deployments.accounts_config import KeyLimits
from deployments.config import AppConfig, LimitsConfig
from deployments.router.bucket import Bucket
from deployments.router.keys import ApiKey, find_keys
from llm.errors import ConfigError

KEY, OTHER = "sk-first-secret", "sk-second-secret"


def key(secret: str, name: str, **limits: int) -> ApiKey:
    return ApiKey(name, hashlib.sha256(secret.encode()).digest(), KeyLimits(**limits))


def bearer(secret: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def ask(service: Service, secret: str = KEY, **fields):
    body = {"model": "demo", "prompt": "a", "max_tokens": 3, **fields}
    return await service.http.post("/v1/completions", json=body, headers=bearer(secret))


def test_a_bucket_fills_evenly_over_a_minute():
    bucket = Bucket(60, now=0.0)
    bucket.take(60, now=0.0)
    assert (bucket.level(0.0), bucket.level(0.5), bucket.level(30.0)) == (0.0, 0.5, 30.0)
    assert bucket.wait_s(31, now=30.0) == 1.0
    assert bucket.level(1000.0) == 60.0, "it holds no more than a minute allows"
    bucket.take(90, now=1000.0)
    assert bucket.wait_s(1, now=1000.0) == 31.0, "a debt is paid off first"


async def test_requests_a_minute(make_service: ServiceFactory):
    service = await make_service(keys=(key(KEY, "first", requests_per_min=2), key(OTHER, "second")))
    first = await ask(service)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 29 < float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
    assert "x-ratelimit-limit-tokens" not in first.headers, "no limit, no header"
    assert (await ask(service)).status_code == 200
    refused = await ask(service)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "requests")
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    assert KEY not in refused.text
    assert (await ask(service, OTHER)).status_code == 200, "another key has limits of its own"
    assert (await service.http.get("/v1/models", headers=bearer())).status_code == 200, "looking costs nothing"


async def test_tokens_a_minute_count_prompt_and_answer(make_service: ServiceFactory):
    service = await make_service(keys=(key(KEY, "first", tokens_per_min=20),))
    first = await ask(service, prompt=[97] * 10, n=2, max_tokens=4, ignore_eos=True)
    assert first.headers["x-ratelimit-remaining-tokens"] == "2", "10 of the prompt, once, and two answers of 4"
    assert (await ask(service, prompt=[97] * 10)).status_code == 200, "a request may start while any are left"
    refused = await ask(service)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert 33 <= int(refused.headers["retry-after"]) <= 36, "11 tokens of debt and one more, at a third a second"


async def cached_tokens(service: Service, secret: str, **fields) -> int:
    answer = await ask(service, secret, prompt=[97] * 64, **fields)
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_cached_prompts_are_shared_as_far_as_is_allowed(make_service: ServiceFactory):
    keys = (key(KEY, "first"), key(OTHER, "second"))
    shared = await make_service(keys=keys)
    assert [await cached_tokens(shared, secret) for secret in (KEY, KEY, OTHER)] == [0, 48, 48]
    assert [await cached_tokens(shared, KEY, cache_salt="mine") for _ in range(2)] == [0, 48]
    apart = await make_service(emulated_config(prefix_cache_per_key=True), keys=keys)
    assert [await cached_tokens(apart, secret) for secret in (KEY, KEY, OTHER, OTHER)] == [0, 48, 0, 48]


async def test_open_requests_of_a_key(make_service: ServiceFactory):
    service = await make_service(paced(50), keys=(key(KEY, "a", max_concurrent_requests=1),))
    long = asyncio.ensure_future(ask(service, max_tokens=100, ignore_eos=True))
    async with asyncio.timeout(30):
        while not service.router.journal.num_live:
            await asyncio.sleep(0.005)
    refused = await ask(service)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "concurrency")
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    async with asyncio.timeout(30):
        while (await ask(service)).status_code != 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": OTHER}, 401),
        ({"x-api-key": KEY, "authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": KEY, "authorization": f"Bearer {OTHER}"}, 401),
        ({"x-api-key": "", "authorization": f"Bearer {KEY}"}, 200),
        ({"x-api-key": KEY, "authorization": ""}, 200),
        ({"x-api-key": "", "authorization": ""}, 401),
        ({"x-api-key": " "}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Basic c2VjcmV0"}, 401),
    ],
)
async def test_where_the_key_stands(make_service: ServiceFactory, headers: dict, status: int):
    service = await make_service(keys=(key(KEY, "first"),))
    assert (await service.http.get("/v1/models", headers=headers)).status_code == status


def test_keys_with_names_and_limits_from_a_file(tmp_path: Path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    (tmp_path / "keys.yaml").write_text(
        f"- {{name: first, key: {KEY}, requests_per_min: 5}}\n- {{name: second, key_sha256: {digest}}}\n"
    )
    config = AppConfig.model_validate(
        {
            "api_keys": ["sk-plain"],
            "api_keys_file": str(tmp_path / "keys.yaml"),
            "limits": {"per_key": {"requests_per_min": 60, "tokens_per_min": 1000}},
        }
    )
    plain, first, second = find_keys(config).keys
    assert plain.name.startswith("key-")
    assert plain.limits == second.limits == KeyLimits(requests_per_min=60, tokens_per_min=1000)
    assert first.limits == KeyLimits(requests_per_min=5, tokens_per_min=1000)
    assert (first.name, second.name, second.digest.hex()) == ("first", "second", digest)
    assert KEY not in repr((plain, first, second))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "holds no key"),
        ("- {name: a}", "exactly one of key and key_sha256"),
        (f"- {{name: a, key: {KEY}, key_sha256: {'ab' * 32}}}", "exactly one of key and key_sha256"),
        ("- {name: a, key_sha256: 12}", "key_sha256"),
        (f"- {{name: a, key: {KEY}, request_per_min: 5}}", "requests_per_min"),
        (f"- {{name: a, key: {KEY}, requests_per_min: 0}}", "requests_per_min"),
        (f"- {{name: a, key: {KEY}}}\n- {{name: a, key: {OTHER}}}", "two API keys are named 'a'"),
        (f"- {{name: a, key: {KEY}}}\n- {{name: b, key: {KEY}}}", "the same API key"),
        (f"- {{name: a, key: {KEY}", "not valid YAML near line"),
        (f"- {{name: a, key: {KEY}, role: admin}}\n- {{name: a, key: {KEY}}}", "'a' is there twice, with different"),
        (f"- name: a\n  key: {KEY}\n  models: [small]\n  models: []", "line 4: a setting is there twice"),
        (f"- {{name: a, key: {KEY}, expires_at: '9999-12-31T23:59:59-12:00'}}", "entry 1: expires_at: .* 1 to 9999"),
        (f"- {{name: a, key: {KEY}, expires_at: '0001-01-01T00:00:00+14:00'}}", "entry 1: expires_at: .* 1 to 9999"),
        (f"- {{name: unknown, key: {KEY}}}", "'unknown' stands for other requests"),
        ("", "the file: must be a list with an entry for each key"),
        (f"- {KEY}", "entry 1: must have settings"),
    ],
)
def test_a_wrong_key_file_stops_the_start_in_one_line_without_a_key(tmp_path: Path, text: str, says: str):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        find_keys(AppConfig(api_keys_file=str(tmp_path / "keys.yaml")))
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


def paced(tokens_per_s: float) -> AppConfig:
    return emulated_config(emulation={"tokens_per_s": tokens_per_s, "max_seq_len": 2048})


def with_limits(config: AppConfig, **limits: float) -> AppConfig:
    return config.model_copy(update={"limits": LimitsConfig(**limits)})


async def call(service: Service, body: bytes, receive_more, send) -> None:
    """One request to `/v1/completions` through ASGI."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    first = True

    async def receive():
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": receive_more is not None}
        return await (receive_more or asyncio.Event().wait)()

    await service.api(scope, receive, send)


async def test_a_body_that_does_not_come_is_408(make_service: ServiceFactory):
    service = await make_service(with_limits(emulated_config(), body_timeout_s=0.1))
    sent = []

    async def send(message):
        sent.append(message)

    await call(service, b'{"model":', asyncio.Event().wait, send)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


async def test_a_client_that_never_reads_is_cut_off(make_service: ServiceFactory, serve_log):
    service = await make_service(with_limits(paced(200), send_timeout_s=0.2))
    sent = []

    async def send(message):
        sent.append(message)
        if len(sent) == 4:
            await asyncio.Event().wait()

    body = b'{"model": "demo", "prompt": "a", "max_tokens": 1000, "ignore_eos": true, "stream": true}'
    async with asyncio.timeout(30):
        await call(service, body, None, send)
    assert len(sent) == 4
    assert any("took nothing" in record.getMessage() for record in serve_log)
    async with asyncio.timeout(30):
        while service.router.journal.num_live:
            await asyncio.sleep(0.005)


async def test_a_client_that_reads_slowly_is_not_cut_off(make_service: ServiceFactory):
    service = await make_service(with_limits(paced(2000), send_timeout_s=0.1))
    sent = []

    async def send(message):
        sent.append(message)
        await asyncio.sleep(0.08)

    await call(service, b'{"model": "demo", "prompt": "a", "max_tokens": 8, "stream": true}', None, send)
    assert sent[-1]["more_body"] is False


async def test_too_many_open_requests_are_503(make_service: ServiceFactory):
    config = paced(20)
    config = config.model_copy(update={"router": config.router.model_copy(update={"max_ongoing_requests": 1})})
    service = await make_service(config)
    long = asyncio.ensure_future(service.post("/v1/completions", prompt="a", max_tokens=50, ignore_eos=True))
    async with asyncio.timeout(30):
        while not service.router.journal.num_live:
            await asyncio.sleep(0.005)
    refused = await service.post("/v1/completions", prompt="a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (await service.http.get("/health")).status_code == 200
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
