"""Adapters on Ray: two routers know the same ones, whatever is killed."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import APP_NAME, ROOT, Server, replica_pids
from small_adapters import write_adapter

from llm.checkpoint.adapter_digest import adapter_digest

pytestmark = pytest.mark.timeout(300)

NAME = f"{APP_NAME}-adapters"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters lie: one that is configured, one in the folder, one that may be loaded."""
    places = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("fixed", "folder/live", "roots/loaded")):
        write_adapter(places / name, seed)
    return places


@pytest.fixture(scope="module")
def adapted(server: Server, places: Path) -> Iterator[Server]:
    """Another application beside the session's: two routers in front of two emulated engines with adapters."""
    from ray import serve

    from deployments.app import build_app
    from deployments.config import AppConfig

    config = AppConfig.model_validate(
        {
            "model": str(ROOT / "configs" / "demo"),
            "engine_kind": "emulated",
            "engine": {"max_adapters": 4, "max_batch_size": 16},
            "emulation": {"tokens_per_s": 50.0},
            "replicas": {"num_cpus": 0.1, "num_replicas": 2},
            "router": {"num_cpus": 0.1, "num_replicas": 2},
            "adapters": [{"name": "fixed", "path": str(places / "fixed")}],
            "adapter_folder": str(places / "folder"),
            "adapter_roots": [str(places / "roots")],
        }
    )
    serve.run(build_app(config), name=NAME, route_prefix="/adapters")
    adapted = Server(f"{server.url}/adapters", num_replicas=2)
    adapted.wait_for(lambda: adapted.http.get("/ready").status_code == 200, 60, "not ready")
    yield adapted
    serve.delete(NAME, _blocking=False)


def at_once(num: int, call: Callable[[], Any]) -> list[Any]:
    """What calls at the same time give, which go to both routers."""
    with ThreadPoolExecutor(num) as pool:
        return [future.result() for future in [pool.submit(call) for _ in range(num)]]


def ask(server: Server, model: str, num_tokens: int = 8) -> tuple[int, str]:
    """Status and text, on a connection of its own, so that either router may get it."""
    body = {"model": model, "prompt": "abc", "max_tokens": num_tokens, "ignore_eos": True}
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    except httpx.TransportError:
        return 0, ""
    return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""


def statuses(server: Server, model: str) -> set[int]:
    return {status for status, _ in at_once(10, lambda: ask(server, model, 1))}


def order(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def is_loaded(server: Server, name: str, path: str) -> bool:
    """Whether the catalog says that an adapter has been loaded already."""
    try:
        answer = order(server, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
    except httpx.TransportError:
        return False
    assert answer.status_code != 200, "it was forgotten, and is loaded anew"
    return answer.status_code == 400 and "already" in answer.text


def pids(deployment: str) -> set[int]:
    """Processes of one deployment of this application."""
    return set(replica_pids(NAME, deployment))


def kill_one(server: Server, deployment: str) -> None:
    """Kill a process of a deployment, and wait for its successor."""
    before = pids(deployment)
    os.kill(min(before), signal.SIGKILL)
    server.wait_for(lambda: len(pids(deployment)) == len(before) and pids(deployment) != before, 60, "no successor")
    server.wait_for(lambda: server.http.get("/ready").status_code == 200, 60, "not ready")


def test_adapters_are_the_same_for_all_routers_whatever_is_killed(adapted: Server, places: Path):
    """Loaded by request they outlive each router and the catalog; a folder's come, change and go for all."""
    listed = [(one["id"], one["parent"]) for one in adapted.http.get("/v1/models").json()["data"]]
    assert listed == [("demo", None), ("fixed", "demo"), ("live", "demo")]
    path = str(places / "roots" / "loaded")
    answer = order(adapted, "/v1/load_lora_adapter", lora_name="loaded", lora_path=path)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'loaded' added successfully.")
    assert statuses(adapted, "loaded") == {200}, "at once, whichever router is asked"
    texts = {name: ask(adapted, name)[1] for name in ("demo", "fixed", "live", "loaded")}
    assert len(set(texts.values())) == 4

    for deployment in ("Router", "AdapterCatalog", "Router"):
        kill_one(adapted, deployment)
        adapted.wait_for(lambda: statuses(adapted, "loaded") == {200}, 60, f"unknown without a {deployment}")
        # Before the next one is killed, as whoever has just started may know nothing yet, the catalog has to know it.
        adapted.wait_for(lambda: is_loaded(adapted, "loaded", path), 60, "the catalog does not know it")
    assert ask(adapted, "loaded")[1] == texts["loaded"]

    write_adapter(places / "folder" / "new", seed=8)
    adapted.wait_for(lambda: statuses(adapted, "new") == {200}, 30, "the folder is not followed")
    shutil.rmtree(places / "folder" / "new")
    adapted.wait_for(lambda: statuses(adapted, "new") == {404}, 30, "it is still there")
    adapted.wait_for(lambda: order(adapted, "/v1/unload_lora_adapter", lora_name="loaded").status_code == 200, 30)
    adapted.wait_for(lambda: statuses(adapted, "loaded") == {404}, 30, "it is still there")
    gone = adapter_digest(places / "roots" / "loaded")
    adapted.wait_for(lambda: gone not in held(adapted), 30, "engines still hold it")
    assert adapter_digest(places / "fixed") in held(adapted)


def held(server: Server) -> set[str]:
    """Digests of the adapters that any replica holds."""
    return {digest for replica in server.stats()["replicas"].values() for digest in replica["adapters"]}


def test_streams_of_adapters_continue_after_a_replica_is_killed(adapted: Server):
    names = ("demo", "fixed", "live") * 3
    whole = {name: ask(adapted, name, 150)[1] for name in set(names)}
    with ThreadPoolExecutor(len(names)) as pool:
        streams = [pool.submit(ask, adapted, name, 150) for name in names]
        adapted.wait_for(lambda: num_running(adapted) == len(names), 60, "not all of them run")
        os.kill(min(pids("EngineReplica")), signal.SIGKILL)
        assert [stream.result() for stream in streams] == [(200, whole[name]) for name in names]


def num_running(server: Server) -> int:
    return sum(replica["num_running"] for replica in server.stats()["replicas"].values())
