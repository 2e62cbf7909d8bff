"""One address for a whole platform: two models, four keys of two roles, two routers and a batch. A router and
a replica are killed and a model is changed in mid-stream, and what clients were told they used is what the record says.
"""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from live_platform import Platform, Stream, entry
from live_server import Server

pytestmark = pytest.mark.timeout(560)

ROLES = {"boss": "admin", "ops": "admin", "team": "user", "guest": "user"}
"""Roles of the keys; the name of each is also its secret."""
ASKS = {"boss": ("chat", "small"), "ops": ("small",), "team": ("chat", "small"), "guest": ("small",)}
"""Models and adapters that each key's streams ask for."""
NUM_TOKENS = 200
"""Tokens of a stream, which take ten seconds."""
NUM_LINES, LINE_TOKENS = 1000, 24


class Scene:
    """A platform in a directory of its own: its configuration, keys, adapters, batches and the record of usage."""

    def __init__(self, front_end: str, directory: Path) -> None:
        self.platform = Platform(front_end, "platform", "boss")
        self.store = directory / "batches"
        keys = [{"name": name, "key_sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ROLES]
        (directory / "keys.yaml").write_text(yaml.safe_dump(keys))
        self._settings = {
            "router": {"num_replicas": 2},
            "api_keys_file": str(directory / "keys.yaml"),
            "batches": {"store": str(self.store), "lease_s": 3, "max_row_use": 0.4},
        }

    def deploy(self, **changes: Any) -> None:
        """Deploy it, or bring one of its models, `small`, to other settings."""
        small = entry("small", 20.0, **changes)
        self.platform.deploy_models(entry("chat", 20.0, 2), small, **self._settings)

    def client(self, key: str) -> openai.OpenAI:
        """OpenAI's client with this key; it tries again when a router dies."""
        return openai.OpenAI(base_url=f"{self.platform.url}/v1", api_key=key, max_retries=5, timeout=60)

    def batch_router(self, batch_id: str) -> int:
        """The process of the router that runs a batch: see `create_runner`."""
        newest = max((self.store / "work" / batch_id / "lease").iterdir())
        return int(json.loads(newest.read_bytes())["holder"].rsplit("-", 2)[1])


@pytest.fixture
def scene(server: Server, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(server.url, tmp_path)
    scene.deploy()
    yield scene
    scene.platform.delete(wait=False)


def lines() -> bytes:
    """A file of requests, for all models in turn."""
    names = ASKS["team"]
    bodies = (
        {"model": names[n % len(names)], "prompt": f"{n}", "max_tokens": LINE_TOKENS, "ignore_eos": True}
        for n in range(NUM_LINES)
    )
    return b"".join(
        json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body}).encode() + b"\n"
        for n, body in enumerate(bodies)
    )


def test_every_token_is_accounted_for_whatever_dies(server: Server, scene: Scene):
    """Streams and lines go on when their replica dies, and clients can repeat what died with its router."""
    platform = scene.platform
    server.wait_for(lambda: platform.lists(chat="ready", small="ready"), 120, "two models")
    team = scene.client("team")
    file = team.files.create(file=("lines.jsonl", lines()), purpose="batch")
    batch = team.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

    def completed() -> int:
        counts = team.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.failed == 0
        return counts.completed

    server.wait_for(lambda: completed() >= 50, 120, "no line was completed")
    with ThreadPoolExecutor(64) as pool:

        def begun(copies: int = 1) -> list[Stream]:
            """Streams of every key that have begun."""
            asked = [(key, name) for key, names in ASKS.items() for name in names] * copies
            streams = [Stream(pool, platform.url, name, NUM_TOKENS, key) for key, name in asked]
            server.wait_for(lambda: all(stream.num_chunks > 3 for stream in streams), 120, "a stream does not begin")
            return streams

        first = begun(copies=2)
        assert completed() < NUM_LINES
        before = platform.router_pids()
        os.kill(scene.batch_router(batch.id), signal.SIGKILL)
        broken = [stream for stream in first if not stream.is_whole()]
        assert 0 < len(broken) < len(first), "each router had some"
        server.wait_for(lambda: len(platform.router_pids()) == len(before), 120, "no other router starts")
        server.wait_for(lambda: platform.lists(chat="ready", small="ready"), 120, "the other router does not answer")

        second = begun()
        os.kill(platform.pids("chat")[0], signal.SIGKILL)
        third = begun()
        old = platform.pids("small")
        scene.deploy(dtype="float32")
        server.wait_for(lambda: platform.pids("small") not in ([], old), 120, "the change had no effect")
        texts: dict[str, set[str]] = {name: set() for names in ASKS.values() for name in names}
        for stream in (*second, *third):
            texts[stream.model].add(stream.whole())
        assert {name: len(found) for name, found in texts.items()} == dict.fromkeys(texts, 1), (
            "streams went on as they were"
        )

    server.wait_for(lambda: team.batches.retrieve(batch.id).status == "completed", 300, "the batch did not end")
    ended = team.batches.retrieve(batch.id)
    assert ended.output_file_id is not None
    answers = [json.loads(text) for text in team.files.content(ended.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"id-{n}" for n in range(NUM_LINES)]
