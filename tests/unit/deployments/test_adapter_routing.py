"""Adapters in routing and in emulated engines: who holds one is preferred, and nobody waits for another's."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from deployments.channel.messages import GenerateCall, decode_call, encode
from deployments.fleet.fleet import Fleet, RoutingKey
from deployments.fleet.policy import ADAPTER_TOKENS, ROW_TOKENS, CostPolicy
from deployments.model_config import EmulationConfig
from deployments.replica.emulated_adapters import EmulatedAdapters
from deployments.replica.emulated_engine import EmulatedEngine
from deployments.router.prompts import prompt_hashes
from llm.config import EngineConfig
from llm.errors import InvalidRequestError
from llm.serving.schemas import AdapterRef, EngineStats, GenerationRequest, Pooling

IDLE = EngineStats(0, 0, 0, 100, 0, 0, 100, 16, 0, 0, 0, 0, max_rows=64)


def ref(name: str, digest: str = "") -> AdapterRef:
    return AdapterRef(name=name, path=f"/adapters/{name}", digest=digest or f"digest of {name}")


def request(adapter: str | None = None, prompt: str = "abc", **fields: Any) -> GenerationRequest:
    fields = {"max_new_tokens": 4, "seed": 0, **fields}
    chosen = ref(adapter) if adapter is not None else None
    return GenerationRequest(prompt_token_ids=tuple(prompt.encode()), adapter=chosen, **fields)


def fleet_of(num_replicas: int) -> Fleet:
    fleet = Fleet(CostPolicy(seed=0))
    for i in range(num_replicas):
        fleet.report(str(i), IDLE, [], [], True)
    return fleet


def test_a_replica_that_holds_the_adapter_is_preferred_until_it_is_too_busy():
    fleet = fleet_of(3)
    fleet.report("1", replace(IDLE, adapters=("x",)), [], [], False)
    for _ in range(10):
        assert fleet.rank(RoutingKey(100, [], adapter="x"))[0] == "1"
    assert {fleet.rank(RoutingKey(100, []))[0] for _ in range(10)} == {"0", "1", "2"}, (
        "requests without one do not care"
    )
    num_rows = ADAPTER_TOKENS // ROW_TOKENS
    fleet.report("1", replace(IDLE, num_running=num_rows - 1, adapters=("x",)), [], [], False)
    assert fleet.rank(RoutingKey(100, [], adapter="x"))[0] == "1"
    fleet.report("1", replace(IDLE, num_running=num_rows + 1, adapters=("x",)), [], [], False)
    assert fleet.rank(RoutingKey(100, [], adapter="x"))[0] != "1"


def test_an_adapter_that_is_being_loaded_counts_until_a_report_knows_better():
    """Requests that come in a burst follow the first one, and not forever if it did not load there."""
    fleet = fleet_of(3)
    first = fleet.rank(RoutingKey(100, [], adapter="x"))[0]
    fleet.sent(first, 1, RoutingKey(100, [], adapter="x"))
    assert fleet.rank(RoutingKey(100, [], adapter="x"))[0] == first
    fleet.report(first, IDLE, [], [], False, received=[1])
    assert fleet.rank(RoutingKey(100, [], adapter="x"))[0] == first, "it is still on its way"
    fleet.ended(1)
    fleet.report(first, IDLE, [], [], False)
    assert len({fleet.rank(RoutingKey(100, [], adapter="x"))[0] for _ in range(6)}) == 3


def simulate(*, heeds_adapters: bool) -> tuple[float, float]:
    """Four replicas with room for 8 adapters each serve 32 adapters, some more popular than others.

    Each moment two requests arrive, and each runs for 10 moments.

    Returns:
        Share of requests that had to wait for their adapter, and the busiest replica's requests over the mean.
    """
    draw, now = random.Random(0), 0.0
    fleet = fleet_of(4)
    replicas = {str(i): EmulatedAdapters(8, 0.0, lambda: now) for i in range(4)}
    running: list[tuple[float, int, str, str]] = []
    served: Counter[str] = Counter()
    num_loads = num_requests = 0
    for moment in range(3000):
        now = float(moment)
        for end in [item for item in running if item[0] <= now]:
            running.remove(end)
            fleet.ended(end[1])
        for _ in range(2):
            num_requests += 1
            adapter = str(min(int(draw.paretovariate(1.0)), 32))
            chosen = fleet.rank(RoutingKey(200, [], adapter=adapter if heeds_adapters else ""))[0]
            fleet.sent(chosen, num_requests, RoutingKey(200, [], adapter=adapter if heeds_adapters else ""))
            num_loads += adapter not in replicas[chosen].digests
            in_use = {item[3] for item in running if item[2] == chosen}
            assert replicas[chosen].use(adapter, in_use)
            running.append((now + 10, num_requests, chosen, adapter))
            served[chosen] += 1
            fleet.prefilled(num_requests)
        for name, adapters in replicas.items():
            num_rows = sum(item[2] == name for item in running)
            received = [item[1] for item in running if item[2] == name]
            fleet.report(
                name, replace(IDLE, num_running=num_rows, adapters=adapters.digests), [], [], False, received=received
            )
    return num_loads / num_requests, max(served.values()) / (num_requests / 4)


def test_routing_by_adapter_loads_less_and_starves_nobody():
    loads, busiest = simulate(heeds_adapters=True)
    loads_otherwise, _ = simulate(heeds_adapters=False)
    assert loads < loads_otherwise / 3
    assert busiest < 1.5


def test_a_call_carries_the_adapter():
    call = decode_call(encode(GenerateCall.of(request("x"), 1, None)))
    assert call.to_request().adapter == ref("x")
    assert decode_call(encode(GenerateCall.of(request(), 1, None))).to_request().adapter is None


def test_pages_are_named_by_the_adapter():
    """As engines name them: otherwise a replica would seem to hold a prompt that another adapter has computed."""
    prompt = "a" * 64
    names = [
        prompt_hashes([one], 16).popitem()[1]
        for one in (
            request(None, prompt), request("x", prompt), request("y", prompt), request("x", prompt, cache_salt="s")
        )
    ]  # fmt: skip
    assert len({tuple(name) for name in names}) == 4
    engine = emulated(2)
    engine.add_request(request("x", prompt + "b"))
    for _ in range(50):
        engine.step()
    assert {name & (2**64 - 1) for name in engine.pool.content} == set(names[1])


def emulated(max_adapters: int, **emulation: Any) -> EmulatedEngine:
    settings = EmulationConfig(tokens_per_s=1000.0, **{"adapter_load_s": 0.0, **emulation})
    return EmulatedEngine(EngineConfig(max_batch_size=4, max_adapters=max_adapters, num_pages=64), settings)


def run(engine: EmulatedEngine, *requests: GenerationRequest) -> dict[str, list[int]]:
    """Each request's tokens, by its adapter's name, in the order in which they ended."""
    names = {engine.add_request(one): one.adapter.name if one.adapter else "" for one in requests}
    tokens: dict[str, list[int]] = {}
    while engine.has_pending_work:
        for output in engine.step():
            tokens.setdefault(names[output.request_id], []).extend(output.token_ids)
    return tokens


def test_the_emulated_engine_answers_differently_with_each_adapter():
    engine = emulated(4)
    mixed = run(engine, request(), request("x"), request("y"))
    alone = {name: run(emulated(4), one)[name] for name, one in {"x": request("x"), "y": request("y")}.items()}
    assert mixed["x"] == alone["x"]
    assert mixed["y"] == alone["y"]
    assert len({tuple(tokens) for tokens in mixed.values()}) == 3
    assert set(engine.stats().adapters) == {"digest of x", "digest of y"}
    vectors = []
    for one in (request(pooling=Pooling.LAST), request("x", pooling=Pooling.LAST)):
        engine.add_request(one)
        vectors += [output.vector for _ in range(20) for output in engine.step() if output.vector]
    assert len(set(vectors)) == 2


def test_only_requests_for_the_adapter_wait_for_it():
    order = list(run(emulated(1, adapter_load_s=0.3), request("x"), request(), request("x", "de")))
    assert order == ["", "x"]


def test_an_engine_with_room_for_one_adapter_serves_two_in_turn():
    engine = emulated(1)
    assert set(run(engine, request("x", max_new_tokens=20), request("y"))) == {"x", "y"}
    assert engine.stats().adapters == ("digest of y",)


def test_an_engine_without_adapters_refuses_them():
    with pytest.raises(InvalidRequestError, match="max_adapters"):
        emulated(0).add_request(request("x"))
