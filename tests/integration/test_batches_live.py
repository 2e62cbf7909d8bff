"""A batch of 1,000 lines on Ray: two routers, and all of its answers once and in order, whoever dies meanwhile."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Server

from chaos.fleet import Fleet, emulated

pytestmark = pytest.mark.timeout(560)

NUM_LINES = 1000


def lines() -> bytes:
    body = {"model": "demo", "max_tokens": 24, "ignore_eos": True}
    return b"".join(
        json.dumps(
            {
                "custom_id": f"id-{n}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {**body, "prompt": f"number {n}"},
            }
        ).encode()
        + b"\n"
        for n in range(NUM_LINES)
    )


@pytest.fixture
def fleet(server: Server, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(server.url, "batches")
    args = emulated(2)
    args["replicas"]["graceful_shutdown_timeout_s"] = 5
    args["router"] |= {"num_replicas": 2, "graceful_shutdown_timeout_s": 5}
    args["batches"] = {"store": str(tmp_path / "store"), "lease_s": 3}
    fleet.deploy(args)
    yield fleet
    fleet.delete(wait=False)


def holder(store: Path, batch_id: str) -> int:
    """The process that runs a batch: see `create_runner`."""
    newest = max((store / "work" / batch_id / "lease").iterdir())
    return int(json.loads(newest.read_bytes())["holder"].rsplit("-", 2)[1])


def test_a_batch_survives_a_router_and_a_replica(fleet: Fleet, tmp_path: Path):
    """The router that runs the batch is killed, then an engine; last, everything is deployed anew."""
    app = Server(fleet.url)
    app.wait_for(lambda: app.http.get("/ready").status_code == 200, 120, "not ready")
    client = app.openai.with_options(max_retries=5)
    file = client.files.create(file=("lines.jsonl", lines()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

    def completed() -> int:
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.failed == 0
        return counts.completed

    app.wait_for(lambda: completed() >= 100, 120, "no line was completed")
    first = holder(tmp_path / "store", batch.id)
    assert first in fleet.router_pids()
    os.kill(first, signal.SIGKILL)
    app.wait_for(lambda: holder(tmp_path / "store", batch.id) != first, 60, "nobody went on with the batch")
    before = completed()
    fleet.hurt_one(signal.SIGKILL)
    app.wait_for(lambda: completed() > before, 120, "no line was completed after an engine was killed")
    if client.batches.retrieve(batch.id).status == "in_progress":
        fleet.delete()
        fleet.deploy(fleet.args)
    app.wait_for(lambda: client.batches.retrieve(batch.id).status == "completed", 300, "the batch did not end")
    ended = client.batches.retrieve(batch.id)
    assert ended.request_counts is not None
    assert ended.request_counts.model_dump() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert ended.usage is not None
    assert ended.usage.output_tokens == 24 * NUM_LINES, "each line counts once, though some ran twice"
    assert ended.model == "demo"
    assert ended.output_file_id is not None
    answers = [json.loads(text) for text in client.files.content(ended.output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == [f"id-{n}" for n in range(NUM_LINES)]
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {24}
