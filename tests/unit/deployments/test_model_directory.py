"""Several models behind one router process: which one answers, and that the others do not notice."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from in_process import DEMO, LocalClient, Service, eventually
from pydantic import ValidationError

from deployments.config import AppConfig, LiveConfig
from deployments.replica.engine_replica import EngineReplica
from deployments.router.canary import share_out
from deployments.router.model_state import ModelState
from llm.errors import ConfigError

pytestmark = pytest.mark.timeout(120)

ASLEEP = {"autoscaling": {"min_replicas": 0, "max_replicas": 1}}


def entry(name: str, **changes: Any) -> dict[str, Any]:
    """A model with an emulated engine."""
    fields = {
        "model": str(DEMO),
        "served_model_name": name,
        "engine_kind": "emulated",
        "engine": {"max_batch_size": 16, "num_pages": 2048},
        "emulation": {"tokens_per_s": 1000.0, "max_seq_len": 2048},
    }
    return {**fields, **changes}


def platform(*entries: dict[str, Any], **settings: Any) -> AppConfig:
    return AppConfig.model_validate({"models": entries, **settings})


@contextlib.asynccontextmanager
async def serving(
    config: AppConfig, num_replicas: dict[str, int] | None = None, clients: dict[str, LocalClient] | None = None
) -> AsyncIterator[Service]:
    """A router process with engine replicas for each model, one unless `num_replicas` says otherwise.

    The replicas of each model are put into `clients`.
    """
    wanted = {key: (num_replicas or {}).get(key, 1) for key in config.by_key}
    clients = {} if clients is None else clients
    for key, model in config.by_key.items():
        clients[key] = LocalClient([EngineReplica(model, f"{key}-{i}") for i in range(wanted[key])])
    service = Service(config, clients)  # type: ignore[arg-type]
    try:
        for router in service.directory.routers:
            await eventually(lambda router=router: len(router.fleet.replica_ids) == wanted[router.key])
        yield service
        await eventually(lambda: service.directory.num_live == 0)
    finally:
        await service.http.aclose()
        service.close()
        for client in clients.values():
            client.close()


async def ask(service: Service, model: str, **body: Any) -> Any:
    answer = await service.post("/v1/completions", model=model, prompt="abc", max_tokens=4, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_requests(service: Service) -> dict[str, int]:
    """Requests that each model's router has begun."""
    return {router.key: router.journal.num_requests for router in service.directory.routers}


async def test_the_request_names_the_model():
    """By its name or an alias; each model's own engine answers, under the model's name."""
    async with serving(platform(entry("small"), entry("large", aliases=["gpt-4"]))) as service:
        assert (await ask(service, "small"))["model"] == "small"
        assert (await ask(service, "gpt-4"))["model"] == "large"
        assert (await ask(service, "large"))["model"] == "large"
        assert num_requests(service) == {"small": 1, "large": 2}


async def test_an_unknown_model_is_refused_with_those_there_are():
    async with serving(platform(entry("small"), entry("large"))) as service:
        answer = await service.post("/v1/completions", model="huge", prompt="abc")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "small, large" in answer.json()["error"]["message"]
        unnamed = await service.http.post("/tokenize", json={"prompt": "abc"})
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")


BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/embeddings": {"input": "a"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/pooling": {"input": "a"},
    "/tokenize": {"prompt": "a"},
}


@pytest.mark.parametrize("unnamed", [{}, {"model": None}, {"model": ""}], ids=["missing", "null", "empty"])
async def test_a_request_that_names_no_model_is_for_the_only_one(unnamed: dict[str, Any]):
    """Wherever models are asked; of several models, it is told which there are."""
    scoring = {"method": "embeddings"}
    async with serving(platform(entry("small", scoring=scoring))) as service:
        for path, body in BODIES.items():
            answer = await service.http.post(path, json={**body, **unnamed})
            assert answer.status_code == 200, (path, answer.text)
            assert answer.json().get("model", "small") == "small"
        assert (await service.http.get("/ready?model=")).status_code == 200
    async with serving(platform(entry("small"), entry("large"))) as service:
        for path, body in BODIES.items():
            answer = await service.http.post(path, json={**body, **unnamed})
            assert (answer.status_code, "small, large" in answer.text) == (400, True), (path, answer.text)


async def test_models_are_listed_with_aliases_and_states():
    config = platform(entry("small", aliases=["tiny"]), entry("idle", replicas=ASLEEP), entry("large"))
    async with serving(config, {"idle": 0, "large": 0}) as service:
        listed = (await service.http.get("/v1/models")).json()["data"]
        assert [(model["id"], model["state"]) for model in listed] == [
            ("small", "ready"),
            ("idle", "asleep"),
            ("large", "starting"),
        ]
        assert listed[0]["aliases"] == ["tiny"]
        assert (await service.http.get("/v1/models/tiny")).json()["id"] == "small"
        assert (await service.http.get("/v1/models/none")).status_code == 404


async def test_one_model_that_is_down_does_not_make_the_router_unready():
    config = platform(entry("small"), entry("large"))
    async with serving(config, {"large": 0}) as service:
        assert (await service.http.get("/ready")).status_code == 200
        assert (await service.http.get("/ready?model=large")).status_code == 503
        assert (await service.http.get("/ready?model=small")).status_code == 200
        unknown = await service.http.get("/ready?model=none")
        assert unknown.status_code == 404
        assert "small" not in unknown.text, "it answers without a key"


async def test_a_model_asleep_wakes_at_its_first_request():
    """Requests for the other model do not wake it."""
    config = platform(entry("small"), entry("idle", replicas=ASLEEP))
    clients: dict[str, LocalClient] = {}
    async with serving(config, {"idle": 0}, clients) as service:
        idle, client = service.directory.find("idle")[0], clients["idle"]
        await ask(service, "small")
        assert client.num_wake_ups == 0
        asking = asyncio.ensure_future(ask(service, "idle"))
        await eventually(lambda: client.num_wake_ups == 1)
        assert idle.state is ModelState.STARTING
        client.add(EngineReplica(idle.config, "idle-0"))
        assert (await asking)["model"] == "idle"
        assert idle.state is ModelState.READY


async def test_a_replica_that_dies_moves_only_its_own_models_streams():
    config = platform(
        entry("small", emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}),
        entry("large", emulation={"tokens_per_s": 100.0, "max_seq_len": 2048}),
    )
    clients: dict[str, LocalClient] = {}
    async with serving(config, {"small": 2, "large": 2}, clients) as service:
        both = [asyncio.ensure_future(long_answer(service, name)) for name in ("small", "large") for _ in range(4)]
        small, large = service.directory.routers
        live = small.journal._live, large.journal._live
        await eventually(lambda: [sum(len(g.token_ids) > 5 for g in own.values()) for own in live] == [4, 4])
        clients["small"].kill(0)
        for answer in await asyncio.gather(*both):
            assert answer["usage"]["completion_tokens"] == 300
        assert small.journal.num_resumes + small.journal.num_moves > 0
        assert large.journal.num_resumes + large.journal.num_moves == 0


async def long_answer(service: Service, model: str) -> Any:
    body = {"prompt": "abc", "max_tokens": 300, "ignore_eos": True}
    return (await service.post("/v1/completions", model=model, **body)).json()


async def test_figures_are_kept_by_model():
    async with serving(platform(entry("small"), entry("large"))) as service:
        await ask(service, "small")
        await ask(service, "large")
        await ask(service, "large")
        await eventually(lambda: service.directory.num_live == 0)
        text = (await service.http.get("/metrics")).text
        assert 'rayline:requests_total{model_name="small",router="router"} 1.0' in text
        assert 'rayline:requests_total{model_name="large",router="router"} 2.0' in text
        assert 'rayline:api_keys{model_name="",router="router"} 0.0' in text
        stats = (await service.http.get("/rayline/stats")).json()
        assert stats["router"]["num_requests"] == 3
        assert set(stats["replicas"]) == {"small-0", "large-0"}
        assert stats["models"]["large"]["router"]["num_requests"] == 2
        assert stats["models"]["large"]["replicas"] == ["large-0"]
        event = service.directory.fleet_event()
        assert [(model["name"], set(model["replicas"])) for model in event["models"]] == [
            ("small", {"small-0"}),
            ("large", {"large-0"}),
        ]
        assert {item["text"] for item in event["events"]} == {"Replica small-0 joined", "Replica large-0 joined"}
        json.dumps(event)


async def test_admission_is_each_models_own():
    """As configured, and as changed while the routers run: for one model, or for all others."""
    config = platform(entry("small", admission={"max_queue_s": 5}), entry("large"))
    async with serving(config) as service:
        small, large = service.directory.routers

        def queues_s() -> tuple[float, float]:
            return small.dispatcher.config.max_queue_s, large.dispatcher.config.max_queue_s

        assert queues_s() == (5, 30)
        live = {"admission": {"max_queue_s": 7}, "admission_of": {"large": {"max_queue_s": 9}}}
        service.directory.reconfigure(LiveConfig.model_validate(live))
        assert queues_s() == (7, 9)
        with pytest.raises(ConfigError, match="there is no 'larg', but small, large"):
            service.directory.reconfigure(LiveConfig.model_validate({"admission_of": {"larg": {}}}))
        service.directory.reconfigure(LiveConfig())
        assert queues_s() == (5, 30)


CANARY = (entry("chat", weight=0.9), entry("chat", weight=0.1, variant="canary"))


async def test_a_session_stays_with_its_entry():
    """The two entries of a name share its requests; one session's all go to one of them."""
    async with serving(platform(*CANARY)) as service:
        for session in ("one", "two", "three"):
            before = num_requests(service)
            for _ in range(3):
                answer = await service.http.post(
                    "/v1/completions",
                    json={"model": "chat", "prompt": "abc", "max_tokens": 2},
                    headers={"X-Session-Id": session},
                )
                assert answer.json()["model"] == "chat"
            added = {key: number - before[key] for key, number in num_requests(service).items()}
            assert sorted(added.values()) == [0, 3], "one entry got all of them"
        assert [model["id"] for model in (await service.http.get("/v1/models")).json()["data"]] == ["chat"]


async def test_a_conversation_stays_with_the_entry_that_began_it():
    """Without a session or a key each request is drawn by itself, but one that continues a response is not."""
    config = platform(entry("chat", weight=0.5), entry("chat", weight=0.5, variant="canary"))
    async with serving(config) as service:
        began = set()
        for _ in range(20):
            before = num_requests(service)
            previous = None
            for _ in range(3):
                body = {"input": "abc", "max_output_tokens": 2, "previous_response_id": previous}
                answer = await service.post("/v1/responses", model="chat", **body)
                assert answer.status_code == 200, answer.text
                previous = answer.json()["id"]
            added = {key: number - before[key] for key, number in num_requests(service).items()}
            assert sorted(added.values()) == [0, 3], "one entry answered the whole conversation"
            began.add(max(added, key=lambda key: added[key]))
        assert len(began) == 2, "20 conversations on the same entry: once in 500,000 runs"


@dataclass(frozen=True)
class Entry:
    key: str
    weight: float
    can_answer: bool = True


def split(*entries: Entry, num_sessions: int = 4000) -> list[str]:
    """The key of the entry that each session goes to."""
    chosen = [share_out(entries, f"session {i}") for i in range(num_sessions)]
    return [one.key for one in chosen if one is not None]


def test_sessions_are_split_by_weight():
    """4,000 draws of 10 %: more than 5 standard deviations (1.9 %) off is no chance."""
    counts = Counter(split(Entry("main", 0.9), Entry("canary", 0.1)))
    assert abs(counts["canary"] / 4000 - 0.1) < 0.025
    assert Counter(split(Entry("main", 9), Entry("canary", 1))) == counts, "weights are relative"
    assert "canary" not in split(Entry("main", 1.0), Entry("canary", 0.0))


def test_a_growing_canary_takes_sessions_and_gives_none_back():
    small = split(Entry("main", 0.9), Entry("canary", 0.1))
    grown = split(Entry("main", 0.9), Entry("canary", 0.5))
    moved = Counter(zip(small, grown, strict=True))
    assert moved["main", "canary"] > 0
    assert moved["canary", "main"] == 0


def test_an_entry_that_cannot_answer_is_passed_over_while_another_can():
    assert set(split(Entry("main", 0.9), Entry("canary", 0.1, can_answer=False))) == {"main"}
    assert set(split(Entry("main", 0.9, can_answer=False), Entry("canary", 0.1, can_answer=False))) == {
        "main",
        "canary",
    }
    assert share_out((), "session") is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "a", "models": [entry("b")]}, "model: with `models`"),
        ({"engine": {}, "admission": {}, "models": [entry("b")]}, "engine, admission: with `models`"),
        ({"models": []}, "has no entry"),
        ({"models": [{"served_model_name": "a"}]}, "which `model`"),
        ({"models": [entry("a"), entry("a")]}, "give each a `weight`"),
        ({"models": [entry("a", weight=1), entry("a")]}, "give each a `weight`"),
        ({"models": [entry("a", weight=0), entry("a", weight=0)]}, "weight 0"),
        ({"models": [entry("a"), entry("b", aliases=["a"])]}, "'a' is a name or alias of two models"),
        ({"models": [entry("a\n")]}, "printable"),
        ({"models": [entry("a", aliases=["b", " c"])]}, "no space at either end"),
        ({"models": [entry("a", weight=1), entry("a", weight=1, variant="x"), entry("a:x")]}, "give each its own"),
        ({"weight": 0.5}, "leave it out for a single model"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(args: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message.replace("(", r"\(")):
        AppConfig.model_validate(args)


def test_each_entry_has_a_name_of_its_own():
    entries = [entry("a", weight=1), entry("a", weight=1), entry("a", weight=1, variant="canary"), entry("b")]
    assert list(platform(*entries).by_key) == ["a", "a:2", "a:canary", "b"]


def test_the_settings_of_one_model_are_those_at_the_top_level():
    """What an engine replica gets is the model's alone: no key, no router setting."""
    config = AppConfig.model_validate({**entry("a"), "router": {"num_replicas": 3}})
    (only,) = config.entries
    assert only == platform(entry("a")).entries[0]
    assert not hasattr(only, "router")
