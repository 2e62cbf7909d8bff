"""Two routers on Ray, four keys of two roles: every token is accounted for, whichever router answered, and whatever is
killed."""

import contextlib
import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml
from live_server import APP_NAME, ROOT, Server, replica_pids

pytestmark = pytest.mark.timeout(480)

NAME = f"{APP_NAME}-accounts"
ADMINS, USERS = ("boss", "ops"), ("team", "guest")
BUDGET = 60


@pytest.fixture(scope="module")
def accounted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another application beside the session's: two routers in front of one emulated engine."""
    from ray import serve

    from deployments.app import build_app
    from deployments.config import AppConfig

    directory = tmp_path_factory.mktemp("accounts")
    keys = [{"name": name, "key_sha256": hashlib.sha256(name.encode()).hexdigest()} for name in (*ADMINS, *USERS)]
    for key in keys[:2]:
        key["role"] = "admin"
    keys[3] |= {"tokens_per_day": BUDGET, "models": ["demo"]}
    (directory / "keys.yaml").write_text(yaml.safe_dump(keys))
    config = AppConfig.model_validate(
        {
            "model": str(ROOT / "configs" / "demo"),
            "engine_kind": "emulated",
            "emulation": {"tokens_per_s": 50.0, "max_seq_len": 4096},
            "replicas": {"num_cpus": 0.1},
            "router": {"num_cpus": 0.1, "num_replicas": 2},
            "api_keys_file": str(directory / "keys.yaml"),
            "accounts": {"record": f"sqlite:///{directory}/usage.db", "spool": str(directory / "spool")},
        }
    )
    serve.run(build_app(config), name=NAME, route_prefix="/accounts")
    accounted = Server(f"{server.url}/accounts", num_replicas=1)
    accounted.wait_for(lambda: accounted.http.get("/ready").status_code == 200, 60, "not ready")
    yield accounted
    serve.delete(NAME, _blocking=False)


def ask(server: Server, key: str, **fields: object) -> httpx.Response:
    # A connection of its own, so that either router may get it.
    body = {"model": "demo", "prompt": [97] * 8, "max_tokens": 4, "ignore_eos": True, **fields}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def report(server: Server, key: str = "boss") -> dict[str, Counter[str]]:
    """What each key has used, as one router says of all."""
    answer = httpx.get(f"{server.url}/rayline/usage", headers={"authorization": f"Bearer {key}"}, timeout=60)
    if answer.status_code != 200:
        return {}
    found: dict[str, Counter[str]] = {}
    for line in answer.json()["data"]:
        sums = found.setdefault(line["key"], Counter())
        sums.update({name: line[name] for name in ("requests", "prompt_tokens", "output_tokens")})
        sums.update(line["refusals"])
    return found


def processes(*deployments: str) -> set[int]:
    return {pid for deployment in deployments for pid in replica_pids(NAME, deployment)}


def read_until_killed(server: Server, processes: set[int]) -> int:
    """Read a stream, and kill these processes in the middle of it; returns the number of tokens received."""
    body = {"model": "demo", "prompt": [98] * 8, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    headers = {"authorization": "Bearer ops"}
    left, num_received = set(processes), 0
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as stream,
    ):
        for line in stream.iter_lines():
            if line.startswith("data: {") and "choices" in line:
                num_received += len(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            while num_received >= 20 and left:
                os.kill(left.pop(), signal.SIGKILL)
    assert not left, "the stream ended too early"
    return num_received


def test_every_token_is_accounted_for_over_both_routers(accounted: Server):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: (key := ("team", "ops")[i % 2], ask(accounted, key)), range(24)))
    expected: dict[str, Counter[str]] = {}
    for key, answer in answers:
        usage = answer.json()["usage"]
        used = {"requests": 1, "prompt_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
        expected.setdefault(key, Counter()).update(used)
    assert ask(accounted, "team", model="other").status_code == 404
    assert ask(accounted, "stranger").status_code == 401
    expected["team"]["model_not_found"] = 1
    accounted.wait_for(lambda: report(accounted) == expected, 60, "what is reported is not what was used")
    assert {report(accounted, "ops") == expected for _ in range(6)} == {True}, "whichever router and administrator asks"
    assert report(accounted, "team") == {}, "users do not see it"


def test_budgets_and_what_was_generated_survive_the_death_of_everything(accounted: Server):
    """Both routers and the accountant are killed in mid-stream: the record has what the client had got, and the budget
    goes on where it was."""
    with ThreadPoolExecutor(4) as pool:
        assert {one.status_code for one in pool.map(lambda _: ask(accounted, "guest"), range(3))} == {200}
    before = report(accounted).get("ops", Counter())
    killed = processes("Router", "Accountant")
    num_received = read_until_killed(accounted, killed)
    accounted.wait_for(lambda: len(processes("Router", "Accountant") - killed) == 3, 120, "not all are back")

    def is_recorded() -> bool:
        used = report(accounted).get("ops", Counter())
        return used["requests"] == before["requests"] + 1

    accounted.wait_for(is_recorded, 120, "the killed stream is not in the record")
    used = report(accounted)["ops"]
    used.subtract(before)
    assert used["prompt_tokens"] == 8
    assert used["output_tokens"] >= num_received, "what the client had got"
    assert used["output_tokens"] < 3000
    assert report(accounted)["guest"]["output_tokens"] == 12
    assert [ask(accounted, "guest").status_code for _ in range(2)] == [200, 200], "36 of 60"
    accounted.wait_for(lambda: ask(accounted, "guest").status_code == 429, 60, "the budget has no end")
    accounted.wait_for(lambda: {ask(accounted, "guest").status_code for _ in range(6)} == {429}, 60, "at both routers")
    assert ask(accounted, "guest").json()["error"]["code"] == "insufficient_quota"
    own = httpx.get(f"{accounted.url}/v1/usage", headers={"authorization": "Bearer guest"}, timeout=60).json()
    assert own["budgets"]["tokens_per_day"]["used"] >= BUDGET
    assert own["models"] == ["demo"]
