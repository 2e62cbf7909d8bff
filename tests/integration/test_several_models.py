"""Models of one application: `serve deploy` adds, changes and removes one, and the streams of the others go on."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import Server

from chaos.fleet import Fleet, _pids, emulated

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 300
SHORT = {"prompt": "abc", "max_tokens": 3}


def entry(name: str, tokens_per_s: float = 10.0, **changes: Any) -> dict[str, Any]:
    """A model with one emulated engine, whose streams take half a minute: longer than most updates."""
    args = emulated(1, tokens_per_s)
    del args["router"]
    return {**args, "served_model_name": name, **changes}


class Platform(Fleet):
    """An application that is deployed as `serve deploy` does: by a configuration file's content."""

    def deploy_models(self, *models: dict[str, Any]) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": self.name,
            "route_prefix": self.path,
            "import_path": "deployments.app:build_app",
            "args": {"models": models, "router": {"num_cpus": 0.1, "graceful_shutdown_timeout_s": 60}},
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(schema, _blocking=False)  # it would wait no longer than a minute

    def pids(self, model: str) -> list[int]:
        """Processes of a model's replicas."""
        return _pids(f"ray::ServeReplica:{self.name}:EngineReplica-{model}")

    def lists(self, **states: str) -> bool:
        """Whether every router that still gets requests knows these models, in these states."""
        return all(self.states() == states for _ in range(10))

    def states(self) -> dict[str, str]:
        """The state of each model; none while no router answers."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", timeout=30)
        except httpx.TransportError:
            return {}
        return {model["id"]: model["state"] for model in answer.json()["data"]} if answer.status_code == 200 else {}


@pytest.fixture
def platform(server: Server) -> Iterator[Platform]:
    from ray import serve

    platform = Platform(server.url, "platform")
    yield platform
    serve.delete(platform.name, _blocking=False)  # Serve waits for two seconds


class Stream:
    """A streamed answer that is read in a thread."""

    def __init__(self, pool: ThreadPoolExecutor, url: str, model: str) -> None:
        self.text = ""
        self.num_chunks = 0
        self.finish_reason: str | None = None
        self.usage: dict[str, int] = {}
        self._reading: Future[None] = pool.submit(self._read, url, model)

    def _read(self, url: str, model: str) -> None:
        body = {
            "model": model, "prompt": "abc", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True, "seed": 1,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        self.num_chunks += 1
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def whole(self) -> str:
        """Its text, once it has ended as it should."""
        self._reading.result()
        assert (self.finish_reason, self.usage["completion_tokens"]) == ("length", NUM_TOKENS)
        return self.text


def test_models_come_change_and_go_under_open_streams(server: Server, platform: Platform):
    """Nothing of a model that is not concerned is restarted, and no stream of any model breaks, not even of the one
    that is removed."""
    stays, changes, asleep = entry("stays"), entry("changes"), entry("asleep")
    asleep["replicas"] = {
        "num_cpus": 0.1, "graceful_shutdown_timeout_s": 60, "autoscaling": {"min_replicas": 0, "max_replicas": 1},
    }  # fmt: skip
    platform.deploy_models(stays, changes)
    server.wait_for(lambda: platform.lists(stays="ready", changes="ready"), 120, "two models")
    before = platform.pids("stays"), platform.pids("changes")
    with ThreadPoolExecutor() as pool:

        def streams(*models: str) -> list[Stream]:
            """Streams of these models that have begun."""
            begun = [Stream(pool, platform.url, model) for model in models]
            server.wait_for(lambda: all(stream.num_chunks > 3 for stream in begun), 120, "no stream begins")
            return begun

        first = streams("stays", "changes")
        platform.deploy_models(stays, changes, asleep)
        three = {"stays": "ready", "changes": "ready", "asleep": "asleep"}
        server.wait_for(lambda: platform.lists(**three), 120, "the third model is not there")
        assert (platform.pids("stays"), platform.pids("changes")) == before, "a replica was restarted"
        second = streams("stays", "changes", "asleep")
        assert platform.states()["asleep"] == "ready", "its first request has woken it"
        platform.deploy_models(stays, {**changes, "dtype": "float32"})
        server.wait_for(lambda: platform.lists(stays="ready", changes="ready"), 120, "the third model is still there")
        server.wait_for(lambda: platform.pids("changes") not in ([], before[1]), 120, "the change had no effect")
        assert platform.pids("stays") == before[0], "a replica was restarted"
        texts = [stream.whole() for stream in (*first, *second)]
        assert texts[0] == texts[2], "the stream of the model that stays is not what it was"
    for model in ("stays", "changes"):
        answer = httpx.post(f"{platform.url}/v1/completions", json={**SHORT, "model": model}, timeout=60)
        assert answer.status_code == 200, answer.text
    refused = httpx.post(f"{platform.url}/v1/completions", json={**SHORT, "model": "asleep"}, timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    server.wait_for(lambda: platform.pids("asleep") == [], 120, "the removed model still runs")
    assert platform.pids("stays") == before[0], "a replica was restarted"
