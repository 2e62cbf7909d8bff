"""One address for a whole platform: two models, three adapters, four keys of two roles, two routers, and a batch.

A router and a replica are killed and a model is changed in mid-stream. Then every entry in the record of usage belongs
to one request and says what its client was told, and every request has its entry.
"""

import hashlib
import json
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from live_platform import Platform, Stream, authorization, entry as model_entry
from live_server import Server
from small_adapters import write_adapter

pytestmark = pytest.mark.timeout(560)

NAMES = ("chat", "small", "law", "medicine", "haiku")
"""Two models and their three adapters: one from the configuration, one in a watched folder, one loaded by request."""
ASKS = {"boss": ("chat", "law"), "ops": ("medicine", "small"), "team": ("chat", "law", "haiku"), "guest": ("haiku",)}
"""The keys, each of which is its own name, and what their streams ask for. The first two are administrators."""
BUDGET = 1_000_000
NUM_TOKENS = 200
"""Tokens of a stream, which take ten seconds."""
NUM_LINES, LINE_TOKENS = 1000, 24

Entry = dict[str, Any]
Used = dict[tuple[str, str], Counter[str]]
"""Requests and tokens by key and model."""


class Scene:
    """A platform in a directory of its own, which has its keys, adapters, batches and the record of usage."""

    def __init__(self, front_end: str, directory: Path) -> None:
        self.platform = Platform(front_end, "platform", "boss")
        self.store = directory / "batches"
        self.record = directory / "usage.jsonl"
        keys: list[dict[str, Any]] = [
            {"name": name, "key_sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ASKS
        ]
        keys[0]["role"] = keys[1]["role"] = "admin"
        keys[3] |= {"models": ["small", "haiku"], "tokens_per_month": BUDGET}
        (directory / "keys.yaml").write_text(yaml.safe_dump(keys))
        law = {"name": "law", "path": str(write_adapter(directory / "law", seed=1))}
        write_adapter(directory / "watched" / "medicine", seed=2)
        self.haiku = write_adapter(directory / "more" / "haiku", seed=3)
        engine = {"max_batch_size": 64, "num_pages": 8192, "max_adapters": 4}
        self._chat = model_entry(
            "chat", 20.0, 2, engine=engine, adapters=[law], adapter_folder=str(directory / "watched")
        )  # fmt: skip
        self._small = model_entry("small", 20.0, engine=engine, adapter_roots=[str(directory / "more")])
        self._settings = {
            "router": {"num_replicas": 2},
            "api_keys_file": str(directory / "keys.yaml"),
            "accounts": {"record": str(self.record), "spool": str(directory / "spool")},
            "batches": {"store": str(self.store), "lease_s": 5, "max_row_use": 0.4},
        }

    def deploy(self, **changes: Any) -> None:
        """Deploy it, or bring one of its models, `small`, to other settings."""
        self.platform.deploy_models(self._chat, {**self._small, **changes}, **self._settings)

    def client(self, key: str) -> openai.OpenAI:
        """OpenAI's client with this key; it tries again when a router dies."""
        return openai.OpenAI(base_url=f"{self.platform.url}/v1", api_key=key, max_retries=5, timeout=60)

    def load_haiku(self, key: str) -> httpx.Response:
        """Have `small` take another adapter."""
        order = {"lora_name": "haiku", "lora_path": str(self.haiku), "model": "small"}
        url = f"{self.platform.url}/v1/load_lora_adapter"
        return httpx.post(url, json=order, headers=authorization(key), timeout=60)

    def has_all(self) -> bool:
        """Whether every router knows every model and adapter, and has engines for them."""
        return self.platform.lists(**dict.fromkeys(NAMES, "ready"))

    def batch_router(self, batch_id: str) -> int:
        """The process of the router that runs a batch: see `create_runner`."""
        newest = max((self.store / "work" / batch_id / "lease").iterdir())
        return int(json.loads(newest.read_bytes())["holder"].rsplit("-", 2)[1])

    def entries(self) -> list[Entry]:
        """What the record has."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def usage(self, path: str, key: str) -> Any:
        """What the platform says was used; empty while it cannot say it."""
        answer = httpx.get(f"{self.platform.url}{path}", headers=authorization(key), timeout=60)
        return answer.json() if answer.status_code == 200 else {}


@pytest.fixture
def scene(server: Server, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(server.url, tmp_path)
    scene.deploy()
    yield scene
    scene.platform.delete(wait=False)


class Batch:
    """A batch of a thousand short lines for all models and adapters in turn, as its client sees it."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        file = client.files.create(file=("lines.jsonl", b"\n".join(map(self._line, range(NUM_LINES)))), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        self.id = batch.id

    @staticmethod
    def _line(n: int) -> bytes:
        body = {"model": NAMES[n % 5], "prompt": f"{n}", "max_tokens": LINE_TOKENS, "ignore_eos": True}
        return json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body}).encode()

    def num_completed(self) -> int:
        """Lines that have an answer; none may have an error."""
        counts = self._client.batches.retrieve(self.id).request_counts
        assert counts is not None
        assert counts.failed == 0
        return counts.completed

    def has_ended(self) -> bool:
        """Whether the whole batch is done."""
        return self._client.batches.retrieve(self.id).status == "completed"

    def answers(self) -> list[dict[str, Any]]:
        """What came of the lines: each line once, in order."""
        file_id = self._client.batches.retrieve(self.id).output_file_id
        assert file_id is not None
        answers = [json.loads(text) for text in self._client.files.content(file_id).text.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [f"id-{n}" for n in range(NUM_LINES)]
        return answers


def tokens_of(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Prompt, cached and output tokens of an answer."""
    details = usage.get("prompt_tokens_details") or {}
    return usage["prompt_tokens"], details.get("cached_tokens", 0), usage["completion_tokens"]


def recorded(entry: Entry) -> tuple[int, int, int]:
    """Prompt, cached and output tokens of an entry."""
    return entry["prompt_tokens"], entry["cached_tokens"], entry["output_tokens"]


def check_entries(entries: Sequence[Entry], streams: Sequence[Stream], answers: Sequence[dict[str, Any]]) -> None:
    """Every entry belongs to a request and says what its client was told, and every request has its entry."""
    assert len({(entry["writer"], entry["seq"]) for entry in entries}) == len(entries), "an entry is there twice"
    by_request: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry["outcome"] != "refused":
            by_request[entry["request_id"]].append(entry)
    [num_prompt_tokens] = {stream.usage["prompt_tokens"] for stream in streams if stream.is_whole()}
    for stream in streams:
        [entry] = by_request.pop(stream.request_id)
        assert (entry["key"], entry["model"]) == (stream.key, stream.model)
        if stream.is_whole():
            assert (entry["outcome"], recorded(entry)) == ("length", tokens_of(stream.usage))
        else:
            assert (entry["outcome"], entry["prompt_tokens"]) == ("killed", num_prompt_tokens)
            assert len(stream.text) <= entry["output_tokens"] <= NUM_TOKENS, "what its client had got, and no more"
    for answer in answers:
        # A line that ran when its router ended ran again, and what it had used until then counts too.
        found = by_request.pop(answer["response"]["request_id"])
        body = answer["response"]["body"]
        assert {(entry["key"], entry["model"]) for entry in found} == {("team", body["model"])}
        whole = [entry for entry in found if entry["outcome"] == "length"]
        assert {recorded(entry)[::2] for entry in whole} == {tokens_of(body["usage"])[::2]}
        assert len({entry["writer"] for entry in whole}) == len(whole), "a router counted a line twice"
        assert all(entry["output_tokens"] <= LINE_TOKENS for entry in found)
    assert not by_request, "nobody asked for this"


def sums(rows: Sequence[dict[str, Any]]) -> Used:
    """Usage by key and model, without names that have only refusals."""
    used: Used = defaultdict(Counter)
    for row in rows:
        if requests := row.get("requests", row.get("num_requests")):
            counts = {name: row[name] for name in ("prompt_tokens", "cached_tokens", "output_tokens")}
            used[row["key"], row["model"]].update(requests=requests, **counts)
    return dict(used)


def check_reports(server: Server, scene: Scene, entries: Sequence[Entry]) -> None:
    """Administrators and keys are told the sums of what is recorded."""
    expected = sums([entry for entry in entries if entry["outcome"] != "refused"])

    def report() -> list[dict[str, Any]]:
        return scene.usage("/rayline/usage", "ops").get("data", [])

    def refusals() -> int:
        return sum(row["refusals"].get("model_not_found", 0) for row in report() if row["key"] == "guest")

    server.wait_for(lambda: sums(report()) == expected, 60, "the report is not what is recorded")
    server.wait_for(lambda: refusals() == 1, 60, "the refused request is not in the report")
    for key in ASKS:
        own = scene.usage("/v1/usage", key)
        models = own["this_month"]["models"]
        assert sums([{"key": key, "model": model, **row} for model, row in models.items()]) == {
            place: counts for place, counts in expected.items() if place[0] == key
        }
    spent = sum(
        counts["prompt_tokens"] + counts["output_tokens"] for place, counts in expected.items() if place[0] == key
    )
    assert own["budgets"]["tokens_per_month"]["used"] == spent, "the last key is the one with a budget"


def run_the_day(server: Server, scene: Scene, batch: Batch, pool: ThreadPoolExecutor) -> list[Stream]:
    """Kill a router and a replica and change a model, each under open streams; returns all streams, ended."""
    platform = scene.platform

    def begun(copies: int = 1) -> list[Stream]:
        """Streams of every key that have begun."""
        asked = [(key, name) for key, names in ASKS.items() for name in names] * copies
        streams = [Stream(pool, platform.url, name, NUM_TOKENS, key) for key, name in asked]
        server.wait_for(lambda: all(stream.num_chunks > 3 for stream in streams), 120, "a stream does not begin")
        return streams

    first = begun(copies=2)
    assert batch.num_completed() < NUM_LINES
    os.kill(scene.batch_router(batch.id), signal.SIGKILL)
    broken = [stream for stream in first if not stream.is_whole()]
    assert 0 < len(broken) < len(first), "each router had some"
    server.wait_for(lambda: len(platform.router_pids()) == 2, 120, "no other router starts")
    server.wait_for(scene.has_all, 120, "the other router does not know everything")

    second = begun()
    os.kill(platform.pids("chat")[0], signal.SIGKILL)
    third = begun()
    old = set(platform.pids("small"))
    scene.deploy(dtype="float32")
    server.wait_for(lambda: set(platform.pids("small")) - old != set(), 120, "the change had no effect")
    texts = {name: {stream.whole() for stream in (*second, *third) if stream.model == name} for name in NAMES}
    assert {name: len(found) for name, found in texts.items()} == dict.fromkeys(NAMES, 1), "a stream changed on its way"
    assert len(set.union(*(texts[name] for name in ("chat", "law", "medicine")))) == 3, "adapters make a difference"
    for stream in broken:
        assert min(texts[stream.model]).startswith(stream.text)
    server.wait_for(lambda: not old & set(platform.pids("small")), 120, "the old version still runs")
    server.wait_for(scene.has_all, 120, "something is missing after the change")
    fourth = begun()
    assert {stream.whole() for stream in fourth if stream.model == "small"} != texts["small"], "it is another version"
    return [*first, *second, *third, *fourth]


def test_every_token_is_accounted_for_whatever_dies(server: Server, scene: Scene):
    """Streams and lines go on when their replica dies. What dies with its router is recorded as far as it came."""
    platform = scene.platform
    server.wait_for(lambda: platform.lists(**{name: "ready" for name in NAMES if name != "haiku"}), 120, "not ready")
    assert scene.load_haiku("team").status_code == 403
    answer = scene.load_haiku("ops")
    assert answer.status_code == 200, answer.text
    server.wait_for(scene.has_all, 60, "the adapter is not there")
    with pytest.raises(openai.NotFoundError):
        scene.client("guest").completions.create(model="law", prompt="abc", max_tokens=4)
    batch = Batch(scene.client("team"))
    server.wait_for(lambda: batch.num_completed() >= 50, 120, "no line was completed")
    with ThreadPoolExecutor(64) as pool:
        streams = run_the_day(server, scene, batch, pool)
    server.wait_for(batch.has_ended, 300, "the batch did not end")
    answers = batch.answers()
    ids = {*(stream.request_id for stream in streams), *(answer["response"]["request_id"] for answer in answers)}
    server.wait_for(
        lambda: ids <= {entry["request_id"] for entry in scene.entries()}, 60, "a request is not in the record"
    )
    check_entries(scene.entries(), streams, answers)
    check_reports(server, scene, scene.entries())
