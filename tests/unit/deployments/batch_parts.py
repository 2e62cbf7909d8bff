"""Batches without an API: a store, answers that are made up, and capacity as one likes."""

import asyncio
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.batches.calls import LineAnswer, Spare
from deployments.batches.desk import BatchDesk
from deployments.batches.file_shelf import Page
from deployments.batches.open_store import open_store
from deployments.batches.records import Batch, Purpose
from deployments.batches.runner import BatchRunner
from deployments.batches_config import BatchesConfig

URL = "/v1/completions"


class Plenty:
    """As much capacity as anybody wants."""

    num_lines = 1000

    def spare(self, model: str | None, max_row_use: float) -> Spare:
        return Spare(self.num_lines, math.inf)


class Answers:
    """Answers each line with its own body, unless told otherwise.

    Attributes:
        asked: the `n` of every line, in the order in which they were asked.
        answer: gives the answer to a line's body.
        hold: lines wait for it.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.owners: set[str] = set()
        self.num_open = 0
        self.most_open = 0
        self.answer: Callable[[dict[str, Any]], LineAnswer] = lambda body: LineAnswer(200, json.dumps(body).encode())
        self.hold: asyncio.Event = asyncio.Event()
        self.hold.set()

    async def call(self, owner: str, url: str, body: bytes, request_id: str) -> LineAnswer:
        asked = json.loads(body)
        self.asked.append(asked["n"])
        self.owners.add(owner)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await self.hold.wait()
            await asyncio.sleep(asked.get("delay_s", 0))
            return self.answer(asked)
        finally:
            self.num_open -= 1


class Clock:
    """Seconds since 1970, which tests may set."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def lines_of(number: int, **body: Any) -> bytes:
    return b"".join(
        json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": URL, "body": {"n": n, **body}}).encode() + b"\n"
        for n in range(number)
    )


def add_file(desk: BatchDesk, content: bytes, owner: str = "me") -> str:
    upload = desk.files.begin(owner)
    upload.write(content)
    return upload.keep("in.jsonl", Purpose.BATCH).id


def add_batch(desk: BatchDesk, content: bytes, owner: str = "me", window: str = "24h") -> Batch:
    file_id = add_file(desk, content, owner)
    batch = desk.ledger.create(owner, input_file_id=file_id, endpoint=URL, completion_window=window)
    desk.changed.set()
    return batch


def read_lines(desk: BatchDesk, file_id: str | None, owner: str = "me") -> list[dict[str, Any]]:
    if file_id is None:
        return []
    record = desk.files.get(owner, file_id)
    return [json.loads(text) for text in desk.files.read(file_id, 0, record.num_bytes).splitlines()]


async def end_of(desk: BatchDesk, batch: Batch, owner: str = "me", timeout_s: float = 120) -> Batch:
    async with asyncio.timeout(timeout_s):
        while not (found := desk.ledger.get(owner, batch.record.id)).status.is_final:
            await asyncio.sleep(0.02)
        while batch.record.id in desk.ledger.active_ids():
            await asyncio.sleep(0.02)
    return found


def everything(desk: BatchDesk, owner: str = "me") -> list[Batch]:
    return desk.ledger.page(owner, Page(100))[0]


class _LoggedAnswers(Answers):
    """Writes down who was asked what."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def call(self, owner: str, url: str, body: bytes, request_id: str) -> LineAnswer:
        os.write(self._file, f"{os.getpid()} {json.loads(body)['n']}\n".encode())
        return await super().call(owner, url, body, request_id)


async def _run_until_killed(store: str, log: str, lease_s: str) -> None:
    config = BatchesConfig(store=store, lease_s=float(lease_s), max_concurrency=8)
    desk = BatchDesk(open_store(store), config)
    runner = BatchRunner(desk, _LoggedAnswers(Path(log)), Plenty(), f"process-{os.getpid()}", 1 << 20)
    runner.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_run_until_killed(*sys.argv[1:]))
