"""What keys may do and have used, over HTTP without a socket: roles, models, expiry, budgets, usage, audit."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from in_process import LocalClient, Service, ServiceFactory, emulated_config, eventually
from starlette.requests import Request

from deployments.accounts_config import KeyLimits, Role
from deployments.api.permissions import is_admin, require_admin
from deployments.chat.errors import APIError
from deployments.config import AppConfig, AwayPolicy
from deployments.errors import RecordAwayError
from deployments.replica.engine_replica import EngineReplica
from deployments.router.access import Access
from deployments.router.keys import ApiKey, KeySource
from deployments.router.meter import Meter
from deployments.usage.entries import Delivery, Receipt, UsageQuery, UsageRow
from deployments.usage.ledger import Ledger
from deployments.usage.place import RecordPlace

EVENING = datetime(2030, 1, 31, 22, 0, tzinfo=UTC)
ALL = UsageQuery("0001-01-01", "9999-12-31")


class FakeClock:
    """Seconds since 1970, as far as tests move them."""

    def __init__(self, at: datetime = EVENING) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at.timestamp()


def api_key(name: str, *, role: Role = Role.USER, models: tuple[str, ...] = (), expires_at: datetime | None = None,
            **limits: int) -> ApiKey:  # fmt: skip
    digest = hashlib.sha256(name.encode()).digest()
    ends = expires_at.timestamp() if expires_at else None
    return ApiKey(name, digest, KeyLimits(**limits), role, frozenset(models), ends)


Make = Callable[..., "asyncio.Future[Service]"]


@pytest.fixture
def make(make_service: ServiceFactory):
    """Makes a service with keys, a clock, and, if told so, a record and others' ledger."""

    async def make_it(
        *keys: ApiKey,
        clock: FakeClock | None = None,
        config: AppConfig | None = None,
        place: RecordPlace | None = None,
        ledger: object = None,
        when_away: AwayPolicy = AwayPolicy.OPEN,
    ) -> Service:
        clock = clock or FakeClock()
        meter = Meter(place, ledger, when_away, clock)
        return await make_service(config, access=Access(KeySource(keys), when_away=when_away, clock=clock, meter=meter))

    return make_it


async def ask(service: Service, key: str, path: str = "/v1/completions", **fields):
    body = {"model": "demo", "prompt": [97] * 10, "max_tokens": 5, "ignore_eos": True, **fields}
    body = {name: value for name, value in body.items() if value is not None}
    return await service.http.post(path, json=body, headers=bearer(key))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def get(service: Service, path: str, key: str):
    return await service.http.get(path, headers=bearer(key))


async def test_administrators_see_everyones_usage_and_users_their_own(make):
    service = await make(api_key("boss", role=Role.ADMIN), api_key("team"))
    assert (await ask(service, "team")).status_code == 200
    assert (await ask(service, "boss", max_tokens=2, n=2)).status_code == 200
    assert (await ask(service, "team", model="nobody")).status_code == 404
    refused = await get(service, "/rayline/usage", "team")
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "insufficient_permissions"
    report = (await get(service, "/rayline/usage", "boss")).json()
    team, boss = (
        {"requests": 1, "prompt_tokens": 10, "output_tokens": 5},
        {"requests": 1, "prompt_tokens": 10, "output_tokens": 4},
    )
    by_key = {line["key"]: line for line in report["data"] if line["model"] == "demo"}
    assert by_key["team"].items() >= {**team, "day": "2030-01-31", "refusals": {}}.items()
    assert by_key["boss"].items() >= boss.items()
    assert report["total"].items() >= {"requests": 2, "prompt_tokens": 20, "output_tokens": 9}.items()
    assert report["total"]["refusals"] == {"model_not_found": 1}
    own = (await get(service, "/v1/usage", "team")).json()
    assert (own["key"], own["role"], own["models"], own["expires_at"], own["budgets"]) == (
        "team",
        "user",
        None,
        None,
        {},
    )
    assert own["today"] == {
        **team, "cached_tokens": 0, "refusals": {"model_not_found": 1},
        "first_day": "2030-01-31", "last_day": "2030-01-31",
        "models": {
            "": {**dict.fromkeys(team, 0), "cached_tokens": 0, "refusals": {"model_not_found": 1}},
            "demo": {**team, "cached_tokens": 0, "refusals": {}},
        },
    }  # fmt: skip
    assert own["this_month"]["first_day"] == "2030-01-01"
    assert "boss" not in json.dumps(own)


async def test_a_report_has_what_it_is_asked_for(make):
    clock = FakeClock()
    service = await make(
        api_key("boss", role=Role.ADMIN), api_key("team"), clock=clock, config=emulated_config(aliases=["alias"])
    )
    await ask(service, "team")
    clock.at += timedelta(days=1)
    await ask(service, "team")
    await ask(service, "boss")

    async def report(query: str) -> list[tuple[str, str]]:
        answer = await get(service, f"/rayline/usage{query}", "boss")
        assert answer.status_code == 200, answer.text
        return [(line["day"], line["key"]) for line in answer.json()["data"]]

    first, second = ("2030-01-31", "team"), ("2030-02-01", "team")
    assert await report("") == [("2030-02-01", "boss"), second], "this month"
    assert await report("?from=2030-01-31&key=team") == [first, second]
    assert await report("?from=2030-01-01&to=2030-01-31") == [first]
    assert await report("?to=2030-01-31") == [first]
    assert await report("?from=2030-01-31&by=period") == [(None, "boss"), (None, "team")]
    assert await report("?model=other") == []
    assert await report("?from=9999-12-31&to=9999-12-31") == []
    assert await report("?model=alias") == await report("?model=demo") == await report("")
    for wrong in ("?from=yesterday", "?from=2030-02-02", "?from=2028-01-01", "?to=2030-13-01", "?from=0001-01-01",
                  "?by=key", "?start=2030-01-31", "?key=%00", "?from=2030-01-31&from=2030-01-30"):  # fmt: skip
        answer = await get(service, f"/rayline/usage{wrong}", "boss")
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), wrong
    own = (await get(service, "/v1/usage?from=2030-01-01&to=2030-01-31", "team")).json()
    assert (own["period"]["first_day"], own["period"]["last_day"]) == ("2030-01-01", "2030-01-31")
    assert own["period"]["models"]["demo"] == {**own["this_month"]["models"]["demo"], "requests": 1}
    assert (await get(service, "/v1/usage", "team")).json()["period"] is None
    for wrong in ("?from=bad", "?by=period", "?key=boss", "?from=2030-02-02"):
        assert (await get(service, f"/v1/usage{wrong}", "team")).status_code == 400, wrong


async def test_a_report_says_what_each_key_has_left(make):
    """As the key itself is told, and without asking the ledger about each."""
    clock = FakeClock()
    boss = api_key("boss", role=Role.ADMIN, models=("demo",), expires_at=EVENING + timedelta(days=9))
    service = await make(boss, api_key("team", tokens_per_day=40, tokens_per_month=100), api_key("free"), clock=clock)
    await ask(service, "team")
    clock.at += timedelta(days=-1)
    await ask(service, "team")
    clock.at += timedelta(days=1)
    report = (await get(service, "/rayline/usage?by=period", "boss")).json()
    told = {key["key"]: key for key in report["keys"]}
    assert list(told) == ["boss", "team", "free"]
    assert told["team"]["budgets"] == (await get(service, "/v1/usage", "team")).json()["budgets"]
    day, month = told["team"]["budgets"]["tokens_per_day"], told["team"]["budgets"]["tokens_per_month"]
    assert (day["used"], day["left"], month["used"], month["left"]) == (15, 25, 30, 70)
    assert (told["boss"]["role"], told["boss"]["models"], told["boss"]["budgets"]) == ("admin", ["demo"], {})
    assert told["boss"]["expires_at"] == "2030-02-09T22:00:00Z"
    assert report["data"][0]["requests"] == 2
    one = (await get(service, "/rayline/usage?key=team&model=none", "boss")).json()
    assert ([key["key"] for key in one["keys"]], one["data"]) == (["team"], [])
    assert one["keys"][0]["budgets"] == told["team"]["budgets"]


async def test_without_keys_everyone_is_an_administrator(make):
    service = await make()
    await ask(service, "whatever")
    report = (await get(service, "/rayline/usage", "")).json()
    assert [(line["key"], line["output_tokens"]) for line in report["data"]] == [("", 5)]
    assert report["keys"] == []
    assert (await get(service, "/v1/usage", "")).json()["today"]["requests"] == 1
    request = Request({"type": "http", "headers": []})
    require_admin(request)
    account = SimpleNamespace(key=api_key("team"))
    with pytest.raises(APIError) as raised:
        require_admin(Request({"type": "http", "headers": [], "state": {"account": account}}))
    assert raised.value.status == 403
    assert is_admin(request)


@pytest.fixture
async def two_models():
    """A process that serves two models; one has an alias."""
    names = ({"served_model_name": "large", "aliases": ["gpt-4"]}, {"served_model_name": "small"})
    fields = emulated_config().model_dump(include={"model", "engine_kind", "engine", "emulation"}, exclude_unset=True)
    config = AppConfig.model_validate({"models": [{**fields, **name} for name in names]})
    clients = {key: LocalClient([EngineReplica(model, f"{key}-0")]) for key, model in config.by_key.items()}
    keys = (api_key("all"), api_key("some", models=("small",)), api_key("alias", models=("gpt-4",)))
    service = Service(config, clients, keys)
    await service.directory.wait_until_ready()
    yield service
    await service.http.aclose()
    service.directory.close()
    for client in clients.values():
        client.close()


async def test_a_key_uses_only_its_models(two_models: Service):
    service = two_models

    async def listed(key: str) -> list[str]:
        return [model["id"] for model in (await get(service, "/v1/models", key)).json()["data"]]

    assert [await listed(key) for key in ("all", "some", "alias")] == [["large", "small"], ["small"], ["large"]]
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
    ):
        bodies = {
            "/v1/embeddings": {"input": "a"}, "/v1/responses": {"input": "a"},
            "/v1/completions": {"prompt": "a"}, "/tokenize": {"prompt": "a"},
        }  # fmt: skip
        body = bodies.get(path, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
        for name in ("large", "gpt-4", "nobody"):
            answer = await service.http.post(path, json={"model": name, **body}, headers=bearer("some"))
            assert answer.status_code == 404, (path, name)
            assert f"'{name}' does not exist or you do not have access to it" in answer.text
            assert "large" not in answer.text.replace(f"'{name}'", ""), "what there is besides is not told"
    assert (await ask(service, "some", model="small")).status_code == 200
    assert (await ask(service, "some", model=None)).json()["model"] == "small", "the only one that there is for it"
    assert (await ask(service, "all", model=None)).status_code == 400
    assert (await ask(service, "alias", model="large")).status_code == 200
    assert (await ask(service, "alias", model="small")).status_code == 404
    assert [(await get(service, f"/v1/models/{name}", "some")).status_code for name in ("large", "small")] == [404, 200]


async def test_an_expired_key_is_refused_and_its_streams_end(make, serve_log):
    clock = FakeClock()
    slow = emulated_config(emulation={"tokens_per_s": 20.0, "max_seq_len": 2048})
    service = await make(
        api_key("guest", expires_at=EVENING + timedelta(hours=1)), api_key("team"), clock=clock, config=slow
    )
    guest, team = (
        asyncio.ensure_future(ask(service, key, max_tokens=num, stream=True))
        for key, num in (("guest", 1500), ("team", 40))
    )
    router = service.router
    streams = lambda: [each for name in router.fleet.replica_ids for each in router.journal.on_replica(name)]  # noqa: E731
    await eventually(lambda: len(streams()) == 2 and all(len(each.token_ids) > 2 for each in streams()))
    clock.at += timedelta(hours=1)
    refused = await ask(service, "guest")
    assert refused.status_code == 401
    assert "expired at 2030-01-31T23:00:00+00:00" in refused.json()["error"]["message"]
    ended = await guest
    assert '"code":"invalid_api_key"' in ended.text
    assert "expired" in ended.text
    assert ended.text.endswith("data: [DONE]\n\n")
    assert '"error"' not in (await team).text
    assert (await get(service, "/v1/models", "guest")).status_code == 401
    [row] = [row for row in await service.directory.access.meter.rows(ALL) if row.key == "guest" and not row.refusal]
    assert (row.num_requests, row.prompt_tokens) == (1, 10)
    assert 0 < row.output_tokens < 1500, "what was generated until then"
    told = {(line["key"], line["status"]): (line["reason"], line["outcome"]) for line in audit_lines(serve_log)}
    assert told["guest", 200] == ("invalid_api_key", "error"), "as the record says"
    assert told["team", 200] == ("", "length")


async def test_priorities_have_a_highest_value(make):
    service = await make(api_key("team", min_priority=-20, max_priority=-5))
    assert [(await ask(service, "team", priority=value)).status_code for value in (-20, -5, -4, -21)] == [
        200,
        200,
        400,
        400,
    ]
    assert (await ask(service, "team")).status_code == 200, "without one it gets the nearest to 0"


async def test_budgets_of_a_day_and_a_month(make):
    """Each begins again at its own midnight in UTC, and other keys have their own."""
    clock = FakeClock()
    key = api_key("team", tokens_per_day=30, tokens_per_month=60)
    service = await make(key, api_key("other"), clock=clock)
    assert [(await ask(service, "team")).status_code for _ in range(2)] == [200, 200]
    refused = await ask(service, "team")
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "30 tokens a day" in error["message"]
    assert "2030-02-01T00:00:00" in error["message"]
    assert int(refused.headers["retry-after"]) == 2 * 3600
    assert refused.headers["x-should-retry"] == "false"
    assert (await ask(service, "other")).status_code == 200
    budgets = (await get(service, "/v1/usage", "team")).json()["budgets"]
    assert budgets["tokens_per_day"] == {"limit": 30, "used": 30, "left": 0, "renews_at": "2030-02-01T00:00:00Z"}
    assert budgets["tokens_per_month"]["left"] == 30
    clock.at = datetime(2030, 2, 1, 0, 0, 1, tzinfo=UTC)
    for day in (1, 3):
        clock.at = clock.at.replace(day=day)
        assert [(await ask(service, "team")).status_code for _ in range(3)] == [200, 200, 429], day
    clock.at = clock.at.replace(day=5)
    refused = await ask(service, "team")
    assert "60 tokens a month" in refused.json()["error"]["message"]
    assert "2030-03-01T00:00:00" in refused.json()["error"]["message"]
    clock.at = datetime(2030, 3, 1, tzinfo=UTC)
    assert (await ask(service, "team")).status_code == 200


@pytest.mark.parametrize("kind", ["json lines", "sqlite"])
async def test_budgets_outlast_a_restart(make, make_service, tmp_path: Path, kind: str):
    record = {"json lines": f"{tmp_path}/usage.jsonl", "sqlite": f"sqlite:///{tmp_path}/usage.db"}[kind]
    place = RecordPlace(record, str(tmp_path / "spool"))
    clock = FakeClock()
    key = api_key("team", tokens_per_day=40)
    first = await make(key, clock=clock, place=place)
    assert [(await ask(first, "team")).status_code for _ in range(2)] == [200, 200]
    assert (await get(first, "/v1/usage", "team")).json()["today"]["requests"] == 2, "the record has them"
    second = await make(key, clock=clock, place=place)
    assert [(await ask(second, "team")).status_code for _ in range(2)] == [200, 429], "30 of 40, then 45"
    clock.at += timedelta(days=1)
    assert (await ask(second, "team")).status_code == 200


async def test_a_stream_counts_while_it_runs(make):
    slow = emulated_config(emulation={"tokens_per_s": 200.0, "max_seq_len": 2048})
    service = await make(api_key("team", tokens_per_day=100), config=slow)
    stream = asyncio.ensure_future(ask(service, "team", max_tokens=1000))
    await eventually(lambda: service.directory.access.meter.budgets.pending_today().get("team", 0) >= 100)
    assert (await ask(service, "team")).status_code == 429
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


class BrokenLedger:
    """A ledger that can be away, as when a database is down."""

    def __init__(self, clock: FakeClock) -> None:
        self.is_away = True
        self.ledger = Ledger(None, clock)

    async def deliver(self, delivery: Delivery) -> Receipt:
        if self.is_away:
            raise RecordAwayError("down")
        return await self.ledger.deliver(delivery)

    async def rows(self, query: UsageQuery) -> list[UsageRow]:
        if self.is_away:
            raise RecordAwayError("down")
        return await self.ledger.rows(query)


@pytest.mark.parametrize(("policy", "status"), [(AwayPolicy.OPEN, 200), (AwayPolicy.CLOSED, 503)])
async def test_a_record_that_is_away_delays_but_loses_nothing(make, tmp_path: Path, policy: AwayPolicy, status: int):
    clock = FakeClock()
    ledger = BrokenLedger(clock)
    place = RecordPlace("elsewhere", str(tmp_path))
    service = await make(
        api_key("free"), api_key("team", tokens_per_day=20), clock=clock, place=place, ledger=ledger, when_away=policy
    )
    assert [(await ask(service, "free")).status_code for _ in range(3)] == [200] * 3, "streams do not wait for it"
    assert (await ask(service, "team")).status_code == status
    away = await get(service, "/v1/usage", "free")
    assert (away.status_code, away.json()["error"]["code"]) == (503, "usage_unavailable")
    assert (await service.http.get("/rayline/stats", headers=bearer("free"))).json()["router"]["is_usage_record_away"]
    ledger.is_away = False
    async with asyncio.timeout(30):
        while (await get(service, "/v1/usage", "free")).status_code != 200:
            await asyncio.sleep(0.05)
    own = (await get(service, "/v1/usage", "free")).json()["today"]
    assert (own["requests"], own["prompt_tokens"], own["output_tokens"]) == (3, 30, 15)
    if status == 200:
        assert [(await ask(service, "team")).status_code for _ in range(2)] == [200, 429], "15 count, and then 30"


async def test_two_routers_share_budgets_through_one_ledger(make):
    clock = FakeClock()
    ledger = Ledger(None, clock)
    key = api_key("team", tokens_per_day=60)
    routers = [await make(key, clock=clock, ledger=ledger) for _ in range(2)]
    answers = []
    for i in range(6):
        answers.append((await ask(routers[i % 2], "team")).status_code)
        for router in routers:
            await router.directory.access.meter.rows(ALL)
            router.directory.access.meter.budgets._heard_at.clear()  # as a second later
    assert answers == [200] * 4 + [429] * 2


async def test_every_way_to_use_a_model_is_counted_as_its_answer_says(make):
    service = await make(api_key("team"))
    chat = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 6}
    expected = [0, 0]

    async def post(path: str, body: dict, usage: Callable[[dict], tuple[int, int]]) -> None:
        answer = await service.http.post(path, json={"model": "demo", **body}, headers=bearer("team"))
        assert answer.status_code == 200, answer.text
        for place, number in enumerate(usage(answer.json())):
            expected[place] += number
        [row] = await service.directory.access.meter.rows(ALL)
        assert [row.prompt_tokens, row.output_tokens] == expected, path

    openai = lambda answer: (answer["usage"]["prompt_tokens"], answer["usage"].get("completion_tokens", 0))  # noqa: E731
    other = lambda answer: (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"])  # noqa: E731
    await post("/v1/chat/completions", chat, openai)
    await post("/v1/chat/completions", {**chat, "n": 3, "stop": ["b", "e"]}, openai)
    await post("/v1/completions", {"prompt": [[97] * 4, [98] * 7], "n": 2, "max_tokens": 3}, openai)
    await post("/v1/embeddings", {"input": ["one", "two and three", "one"]}, openai)
    await post("/v1/messages", chat, other)
    await post("/v1/responses", {"input": "hello", "max_output_tokens": 4}, other)
    assert service.router.journal.num_live == 0


async def test_a_client_that_leaves_pays_for_what_was_generated(make):
    slow = emulated_config(emulation={"tokens_per_s": 100.0, "max_seq_len": 2048})
    service = await make(api_key("team"), config=slow)
    stream = asyncio.ensure_future(ask(service, "team", max_tokens=1000, stream=True))
    await eventually(lambda: service.directory.access.meter.budgets.pending._running["team"] > 15)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    await eventually(lambda: service.directory.num_live == 0)
    [row] = await service.directory.access.meter.rows(ALL)
    assert row.prompt_tokens == 10
    assert 5 < row.output_tokens < 1000
    pending = service.directory.access.meter.budgets.pending
    assert (dict(pending._running), pending._ended) == ({}, {})


def audit_lines(serve_log) -> list[dict]:
    messages = [record.getMessage() for record in serve_log if record.name == "ray.serve.audit"]
    return [json.loads(message.removeprefix("audit ")) for message in messages]


async def test_an_audit_line_for_every_request_and_refusal(make, serve_log):
    secret_prompt = "the launch code is 0000"
    limited = api_key("limited", requests_per_min=1)
    config = emulated_config(limits={"max_body_bytes": 2000})
    service = await make(api_key("boss", role=Role.ADMIN), api_key("team"), limited, config=config)
    headers = {**bearer("team"), "x-request-id": "req-1"}

    async def post(path: str, key: str = "team", **body: object) -> int:
        return (
            await service.http.post(path, json={"model": "demo", **body}, headers={**headers, **bearer(key)})
        ).status_code

    assert await post("/v1/completions", prompt=secret_prompt, max_tokens=4, ignore_eos=True) == 200
    assert await post("/v1/embeddings", input=secret_prompt) == 200
    assert await post("/v1/completions", key="sk-wrong-one", prompt=secret_prompt) == 401
    assert await post("/v1/completions", model="none", prompt=secret_prompt) == 404
    assert await post("/v1/completions", prompt=secret_prompt, max_tokens=-1) == 400
    assert await post("/v1/completions", prompt="x" * 3000) == 413
    assert await post(f"/v1/{secret_prompt}") == 404
    assert (await service.http.get("/rayline/usage", headers=headers)).status_code == 403
    assert [await post("/v1/completions", key="limited", prompt="a", max_tokens=1) for _ in range(2)] == [200, 429]
    assert (await service.http.get("/v1/responses/resp_secret", headers=headers)).status_code == 404
    assert (await service.http.get("/health")).status_code == 200
    lines = audit_lines(serve_log)
    shown = [
        (line["status"], line["key"], line["role"], line["route"], line["model"], line["reason"]) for line in lines
    ]
    assert shown == [
        (200, "team", "user", "/v1/completions", "demo", ""),
        (200, "team", "user", "/v1/embeddings", "demo", ""),
        (401, "unknown", "", "/v1/completions", "", "invalid_api_key"),
        (404, "team", "user", "/v1/completions", "", "model_not_found"),
        (400, "team", "user", "/v1/completions", "", "invalid_request_error"),
        (413, "team", "user", "/v1/completions", "", "body_too_large"),
        (404, "team", "user", "", "", "unknown_route"),
        (403, "team", "user", "/rayline/usage", "", "insufficient_permissions"),
        (200, "limited", "user", "/v1/completions", "demo", ""),
        (429, "limited", "user", "/v1/completions", "", "rate_limit_exceeded"),
        (404, "team", "user", "/v1/responses/{response_id}", "", "response_not_found"),
    ]
    first, second = lines[:2]
    assert (first["request_id"], first["outcome"], first["output_tokens"], first["method"]) == (
        "req-1",
        "length",
        4,
        "POST",
    )
    assert (second["outcome"], second["output_tokens"]) == ("stop", 0)
    assert min(first["prompt_tokens"], second["prompt_tokens"], first["duration_ms"]) > 0
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    text = "\n".join(record.getMessage() for record in serve_log)
    for secret in (secret_prompt, "launch", "sk-wrong-one", "resp_secret"):
        assert secret not in text


async def test_metrics_name_keys_to_administrators_alone(make):
    service = await make(api_key("boss", role=Role.ADMIN), api_key("team", requests_per_min=1))
    assert [(await ask(service, key)).status_code for key in ("team", "team", "nobody")] == [200, 429, 401]
    text = (await get(service, "/metrics", "boss")).text
    labels = 'key="team",model_name="demo",router="router"'
    assert f"rayline:key_requests_total{{{labels}}} 1.0" in text
    assert f"rayline:key_prompt_tokens_total{{{labels}}} 10.0" in text
    assert f"rayline:key_output_tokens_total{{{labels}}} 5.0" in text
    assert (
        'rayline:key_refusals_total{key="team",model_name="",reason="rate_limit_exceeded",router="router"} 1.0' in text
    )
    assert (
        'rayline:key_refusals_total{key="unknown",model_name="",reason="invalid_api_key",router="router"} 1.0' in text
    )
    (await ask(service, "team"))
    others = await get(service, "/metrics", "team")
    assert others.status_code == 200
    assert "rayline:key_" not in others.text
    assert "rayline:requests_total" in others.text
