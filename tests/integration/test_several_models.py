"""Models of one application: `serve deploy` adds, changes and removes one, and the streams of the others go on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_platform import Platform, Stream, entry
from live_server import Server

pytestmark = pytest.mark.timeout(300)

NUM_TOKENS = 300
"""Streams take half a minute: longer than most updates."""
SHORT = {"prompt": "abc", "max_tokens": 3}


@pytest.fixture
def platform(server: Server) -> Iterator[Platform]:
    from ray import serve

    platform = Platform(server.url, "platform")
    yield platform
    serve.delete(platform.name, _blocking=False)  # Serve waits for two seconds


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
            begun = [Stream(pool, platform.url, model, NUM_TOKENS) for model in models]
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
