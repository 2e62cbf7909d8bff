"""Two routers on Ray and what they share: limits are counted once, survive the accountant, and keys can be revoked;
stored responses are found by either, and the fleet page shows both."""

import hashlib
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from live_server import APP_NAME, ROOT, Server, replica_pids

pytestmark = pytest.mark.timeout(240)

NAME = f"{APP_NAME}-limits"
MINUTE, SINGLE, NEXT, OTHER = "sk-minute", "sk-single", "sk-next", "sk-other"
PER_MIN = 20


def write_keys(path: Path, **secrets: str) -> None:
    limits = {"minute": {"requests_per_min": PER_MIN}, "single": {"max_concurrent_requests": 1}}
    entries = [
        {"name": name, "key_sha256": hashlib.sha256(secret.encode()).hexdigest(), **limits.get(name, {})}
        for name, secret in secrets.items()
    ]
    path.write_text(yaml.safe_dump(entries))


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    write_keys(path, minute=MINUTE, single=SINGLE)
    return path


@pytest.fixture(scope="module")
def limited(server: Server, keys_file: Path) -> Iterator[Server]:
    """Another application beside the session's: two routers with keys, in front of one emulated engine."""
    from ray import serve

    from deployments.app import build_app
    from deployments.config import AppConfig

    config = AppConfig.model_validate(
        {
            "model": str(ROOT / "configs" / "demo"),
            "engine_kind": "emulated",
            "emulation": {"tokens_per_s": 20.0},
            "replicas": {"num_cpus": 0.1},
            "router": {"num_cpus": 0.1, "num_replicas": 2},
            "api_keys_file": str(keys_file),
        }
    )
    serve.run(build_app(config), name=NAME, route_prefix="/limits")
    limited = Server(f"{server.url}/limits", num_replicas=1)
    limited.wait_for(lambda: limited.http.get("/ready").status_code == 200, 60, "not ready")
    yield limited
    serve.delete(NAME, _blocking=False)  # Serve waits for two seconds


def ask(server: Server, secret: str, num_tokens: int = 1) -> int:
    body = {"model": "demo", "prompt": "a", "max_tokens": num_tokens, "ignore_eos": True}
    return server.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {secret}"}).status_code


def at_once(num: int, call: Callable[[], Any]) -> list[Any]:
    """What calls at the same time give, which go to both routers."""
    with ThreadPoolExecutor(num) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(num)]]


def ask_at_once(server: Server, secret: str, num: int, num_tokens: int = 1) -> Counter[int]:
    return Counter(at_once(num, lambda: ask(server, secret, num_tokens)))


def filled_up_since(started: float) -> int:
    """Requests that the limit a minute may have let through since then, one that was almost due included."""
    return math.ceil((time.monotonic() - started) * PER_MIN / 60) + 1


def router_states(server: Server, secret: str) -> list[dict]:
    headers = {"authorization": f"Bearer {secret}"}
    return at_once(12, lambda: server.http.get("/rayline/stats", headers=headers).json()["router"])


def test_two_routers_share_limits_and_follow_the_keys(limited: Server, keys_file: Path):
    started = time.monotonic()
    got = ask_at_once(limited, MINUTE, 2 * PER_MIN)
    assert got[200] + got[429] == 2 * PER_MIN
    assert PER_MIN <= got[200] <= PER_MIN + filled_up_since(started), got
    assert router_states(limited, MINUTE)[0]["num_requests"] < got[200], "one router had them all"

    assert ask_at_once(limited, SINGLE, 6, num_tokens=40) == {200: 1, 429: 5}
    assert [ask(limited, SINGLE) for _ in range(10)] == [200] * 10, "one after the other, at whichever router"

    [pid] = replica_pids(NAME, "Accountant")
    os.kill(pid, signal.SIGKILL)
    limited.wait_for(lambda: set(replica_pids(NAME, "Accountant")) - {pid}, 60, "no new accountant")
    limited.wait_for(
        lambda: not any(state["is_accountant_away"] for state in router_states(limited, MINUTE)), 60, "still away"
    )
    ask_at_once(limited, MINUTE, PER_MIN)
    started = time.monotonic()
    got = ask_at_once(limited, MINUTE, PER_MIN)
    assert got[200] <= filled_up_since(started), "a new accountant gives no second allowance"

    write_keys(keys_file, minute=MINUTE, next=NEXT)
    limited.wait_for(lambda: set(ask_at_once(limited, SINGLE, 10)) == {401}, 5, "the key still works")
    limited.wait_for(lambda: set(ask_at_once(limited, NEXT, 10)) == {200}, 5, "the new key does not work")


def test_responses_are_found_whichever_router_is_asked(limited: Server, keys_file: Path):
    """One deployment keeps them for both routers; a key finds its own only."""
    write_keys(keys_file, next=NEXT, neighbour=OTHER)
    for secret in (NEXT, OTHER):
        limited.wait_for(lambda secret=secret: set(ask_at_once(limited, secret, 10)) == {200}, 10, "no key yet")

    def request(method: str, path: str, secret: str, **options: Any) -> httpx.Response:
        # A connection of its own, so that either router may get it.
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.request(method, f"{limited.url}{path}", headers=headers, timeout=60, **options)

    body = {"model": "demo", "max_output_tokens": 2}
    first = request("POST", "/v1/responses", NEXT, json={**body, "input": "one"}).json()["id"]
    path = f"/v1/responses/{first}"
    asked = at_once(8, lambda: request("GET", path, NEXT))
    assert [(answer.status_code, answer.json().get("id")) for answer in asked] == [(200, first)] * 8
    assert {answer.status_code for answer in at_once(4, lambda: request("GET", path, OTHER))} == {404}
    going_on = {**body, "input": "two", "previous_response_id": first}
    second = request("POST", "/v1/responses", NEXT, json=going_on)
    assert second.status_code == 200, second.text
    items = request("GET", f"/v1/responses/{second.json()['id']}/input_items", NEXT).json()["data"]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert request("DELETE", path, NEXT).json()["deleted"]
    assert {answer.status_code for answer in at_once(8, lambda: request("GET", path, NEXT))} == {404}


def test_the_fleet_page_shows_both_routers_whichever_is_asked(limited: Server, keys_file: Path):
    """Each counts its own requests; the page that one of them serves has the sums, and the latencies of both."""
    write_keys(keys_file, next=NEXT)
    limited.wait_for(lambda: set(ask_at_once(limited, NEXT, 10)) == {200}, 10, "no key yet")
    told: dict[str, dict] = {}

    def are_both_asked() -> bool:
        fleet = limited.fleet(NEXT)
        told[fleet["router_id"]] = fleet
        return len(told) == 2

    limited.wait_for(are_both_asked, 60, "one router answers all")
    own = [fleet["router"]["num_requests"] for fleet in told.values()]
    assert min(own) > 0
    for fleet in told.values():
        history = fleet["history"]
        assert history["num_routers"] == 2
        assert history["totals"]["num_requests"] == sum(own)
        assert 0 < history["latency"]["900"]["ttft"]["num"] <= sum(own), "those that got a token"
