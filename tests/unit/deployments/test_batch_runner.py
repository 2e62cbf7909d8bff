"""Batches run to their end: in order, once a line, through refusals, other routers' deaths, cancelling and expiry."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import batch_parts
import pytest
from batch_parts import (
    Answers,
    Clock,
    Plenty,
    add_batch,
    add_file,
    end_of,
    everything,
    lines_of,
    read_lines,
)
from fsspec.implementations.memory import MemoryFileSystem

from deployments.batches import line_runner as line_runner_module, runner as runner_module, store as store_module
from deployments.batches.calls import LineAnswer
from deployments.batches.desk import BatchDesk
from deployments.batches.errors import BatchRefusedError, RefusalKind
from deployments.batches.file_shelf import Page, folder_of
from deployments.batches.line_usage import TokenUsage
from deployments.batches.open_store import open_store
from deployments.batches.records import Batch, BatchStatus
from deployments.batches.results import Result, ResultBook
from deployments.batches.runner import BatchRunner
from deployments.batches_config import BatchesConfig

NFS = ".nfs000000000000000100000001"
OLD_FILE = f"file-{'0' * 28}"


class Bench:
    """A store, and runners on it."""

    def __init__(self, place: str, **settings: Any) -> None:
        self.config = BatchesConfig.model_validate({"store": place, "lease_s": 2, **settings})
        self.clock = Clock()
        self.desk = BatchDesk(open_store(place), self.config, self.clock)
        self.answers = Answers()
        self.capacity = Plenty()
        self.runners: list[BatchRunner] = []

    def start(self, answers: Answers | None = None) -> BatchRunner:
        runner = BatchRunner(self.desk, answers or self.answers, self.capacity, f"runner-{len(self.runners)}", 1 << 20)
        runner.start()
        self.runners.append(runner)
        return runner


@pytest.fixture(params=["directory", "memory"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    bench = Bench(str(tmp_path / "store") if request.param == "directory" else "memory://batches")
    yield bench
    for runner in bench.runners:
        await runner.stop()
    bench.desk.close()


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def custom_ids(lines: list[dict]) -> list[str]:
    return [line["custom_id"] for line in lines]


async def test_results_come_in_order_whenever_they_end(bench: Bench):
    """The first lines take longest. Errors go to their own file, refusals are tried again."""
    refused: Counter[int] = Counter()

    def answer(body: dict) -> LineAnswer:
        if body["n"] % 10 == 3:
            return LineAnswer(400, b'{"error": {"message": "no"}}')
        if body["n"] % 10 == 7 and not refused[body["n"]]:
            refused[body["n"]] += 1
            return LineAnswer((429, 503)[body["n"] % 2], b"{}", 0.0)
        return LineAnswer(200, json.dumps(body).encode())

    bench.answers.answer = answer
    content = b"".join(
        lines_of(60).splitlines(keepends=True)[n].replace(b'{"n"', b'{"delay_s": %f, "n"' % ((60 - n) * 0.002))
        for n in range(60)
    )
    bench.start()
    batch = await end_of(bench.desk, add_batch(bench.desk, content))
    assert (batch.status, batch.state.num_completed, batch.state.num_failed) == (BatchStatus.COMPLETED, 54, 6)
    output = read_lines(bench.desk, batch.state.output_file_id)
    assert custom_ids(output) == [f"id-{n}" for n in range(60) if n % 10 != 3]
    assert [line["response"]["body"]["n"] for line in output] == [n for n in range(60) if n % 10 != 3]
    errors = read_lines(bench.desk, batch.state.error_file_id)
    assert custom_ids(errors) == [f"id-{n}" for n in range(60) if n % 10 == 3]
    assert len({line["id"] for line in output + errors}) == 60
    assert Counter(bench.answers.asked) == Counter(range(60)) + Counter(range(7, 60, 10))
    assert bench.answers.owners == {"me"}


async def test_a_wrong_file_fails_the_batch_before_anything_runs(bench: Bench):
    bench.start()
    content = lines_of(3) + b"nonsense\n" + lines_of(1)
    batch = await end_of(bench.desk, add_batch(bench.desk, content))
    assert batch.status is BatchStatus.FAILED
    assert [(fault.code, fault.line) for fault in batch.state.faults] == [
        ("invalid_json_line", 4), ("duplicate_custom_id", 5),
    ]  # fmt: skip
    assert bench.answers.asked == []
    assert batch.state.output_file_id is None
    empty = await end_of(bench.desk, add_batch(bench.desk, b""))
    assert [fault.code for fault in empty.state.faults] == ["empty_file"]


async def test_cancelling_gives_what_is_done(bench: Bench):
    """Lines that run are given up, and lines that have not run say so."""
    runner = bench.start()
    batch = add_batch(bench.desk, lines_of(50))
    bench.capacity.num_lines = 10  # and so five at a time
    await until(lambda: len(bench.answers.asked) >= 10)
    bench.answers.hold.clear()
    await until(lambda: bench.answers.num_open > 0)
    bench.desk.ledger.cancel("me", batch.record.id)
    assert bench.desk.ledger.get("me", batch.record.id).status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED)
    ended = await end_of(bench.desk, batch)
    assert ended.status is BatchStatus.CANCELLED
    assert ended.cancelling_at is not None
    assert bench.answers.num_open == 0
    output = read_lines(bench.desk, ended.state.output_file_id)
    errors = read_lines(bench.desk, ended.state.error_file_id)
    assert len(output) == ended.state.num_completed > 0
    assert sorted(custom_ids(output + errors)) == sorted(f"id-{n}" for n in range(50))
    assert custom_ids(errors) == sorted(custom_ids(errors), key=lambda one: int(one[3:]))
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    bench.desk.ledger.cancel("me", batch.record.id)  # again: no effect
    await until(lambda: runner.snapshot()["num_ended"]["cancelled"] == 1)


async def test_results_that_nobody_had_noted_count(bench: Bench):
    """A router dies after it has kept the last results and before it has noted how many there are."""
    batch = add_batch(bench.desk, lines_of(3))
    results = [Result(n, n == 2, b"{}", TokenUsage(5, 2, 3, 1)) for n in range(3)]
    ResultBook(bench.desk.store, batch.record.id, lease_number=1).add([*results, *results[:1]])
    bench.start()
    ended = await end_of(bench.desk, batch)
    assert bench.answers.asked == []
    assert (ended.state.num_lines, ended.state.num_completed, ended.state.num_failed) == (3, 2, 1)
    assert ended.state.usage == TokenUsage(15, 6, 9, 3)


async def test_a_window_that_ends_leaves_the_rest_expired(bench: Bench):
    bench.start()
    batch = add_batch(bench.desk, lines_of(30), window="90m")
    bench.capacity.num_lines = 10
    await until(lambda: len(bench.answers.asked) >= 5)
    bench.answers.hold.clear()
    await until(lambda: bench.answers.num_open > 0)
    bench.clock.now += 90 * 60 - 1
    await asyncio.sleep(1)
    assert not bench.desk.ledger.get("me", batch.record.id).status.is_final
    bench.clock.now += 1
    ended = await end_of(bench.desk, batch)
    assert (ended.status, ended.state.ended_at) == (BatchStatus.EXPIRED, batch.record.expires_at)
    output = read_lines(bench.desk, ended.state.output_file_id)
    errors = read_lines(bench.desk, ended.state.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert len(output) + len(errors) == 30
    assert len(output) == ended.state.num_completed


async def test_a_batch_that_nobody_ran_in_time_expires(bench: Bench):
    batch = add_batch(bench.desk, lines_of(3), window="10s")
    bench.clock.now += 60
    bench.answers.hold.clear()  # lines that have begun do not end before it is noticed
    bench.start()
    ended = await end_of(bench.desk, batch)
    assert ended.status is BatchStatus.EXPIRED
    assert len(read_lines(bench.desk, ended.state.error_file_id)) == 3 - ended.state.num_completed


async def test_a_router_that_stops_lets_another_go_on_at_once(bench: Bench):
    """No line is asked twice but those that were running."""
    first = bench.start()
    batch = add_batch(bench.desk, lines_of(40))
    bench.capacity.num_lines = 8
    await until(lambda: len(bench.answers.asked) >= 12)
    bench.answers.hold.clear()
    await until(lambda: bench.answers.num_open > 0)
    num_open = bench.answers.num_open
    await first.stop()
    assert bench.answers.num_open == 0
    bench.answers.hold.set()
    bench.start()
    ended = await end_of(bench.desk, batch)
    assert custom_ids(read_lines(bench.desk, ended.state.output_file_id)) == [f"id-{n}" for n in range(40)]
    assert len(bench.answers.asked) == 40 + num_open


async def test_batches_spread_over_routers(bench: Bench):
    """Each is run by one router at a time, and no router takes all while another is idle."""
    bench.answers.hold.clear()
    others = Answers()
    others.hold.clear()
    runners = [bench.start(), bench.start(others)]
    batches = [add_batch(bench.desk, lines_of(5)) for _ in range(4)]
    await until(lambda: sum(runner.snapshot()["num_running"] for runner in runners) == 4)
    assert min(runner.snapshot()["num_running"] for runner in runners) >= 1
    bench.answers.hold.set()
    others.hold.set()
    for batch in batches:
        assert (await end_of(bench.desk, batch)).state.num_completed == 5
    assert len(bench.answers.asked) + len(others.asked) == 20


async def test_each_owner_gets_a_turn(bench: Bench):
    """A key with many batches does not keep another key's only batch waiting."""
    bench.answers.hold.clear()
    for _ in range(6):
        add_batch(bench.desk, lines_of(1), "many")
    late = add_batch(bench.desk, lines_of(1), "one")
    runner = bench.start()
    await until(lambda: runner.snapshot()["num_running"] == bench.config.max_running)
    assert "one" in bench.answers.owners or late.record.id in runner._jobs
    bench.answers.hold.set()
    await end_of(bench.desk, late, "one")


async def test_an_answer_that_keeps_being_refused_does_not_stop_the_others(bench: Bench):
    bench.answers.answer = lambda body: LineAnswer(503 if body["n"] == 0 else 200, b"{}")
    bench.start()
    batch = add_batch(bench.desk, lines_of(20), window="1h")
    await until(lambda: bench.desk.ledger.get("me", batch.record.id).state.num_completed == 19)
    bench.clock.now += 3600
    ended = await end_of(bench.desk, batch)
    assert (ended.status, ended.state.num_completed) == (BatchStatus.EXPIRED, 19)
    assert custom_ids(read_lines(bench.desk, ended.state.error_file_id)) == ["id-0"]


class _Poor(Answers):
    """Refuses one key's lines for as long as its budget is used up."""

    is_poor = True

    async def call(self, owner: str, url: str, body: bytes, request_id: str) -> LineAnswer:
        if owner == "poor" and self.is_poor:
            return LineAnswer(429, b"{}", retry_after_s=3600.0)
        return await super().call(owner, url, body, request_id)


async def test_a_key_without_a_budget_does_not_keep_others_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Its batches wait where they fill all places, too, and go on once there is something left of the budget."""
    monkeypatch.setattr(runner_module, "_ASIDE_S", 0.5)
    monkeypatch.setattr(line_runner_module, "_LONGEST_PAUSE_S", 0.5)
    bench.config = bench.desk.config = bench.config.model_copy(update={"max_running": 2})
    poor = [add_batch(bench.desk, lines_of(3), owner="poor") for _ in range(3)]
    answers = _Poor()
    runner = bench.start(answers)
    await until(lambda: len(runner._held_up()) == 1 and len(runner._jobs) == 2)
    for _ in range(2):
        other = await end_of(bench.desk, add_batch(bench.desk, lines_of(3), owner="other"), owner="other")
        assert (other.status, other.state.num_completed) == (BatchStatus.COMPLETED, 3)
    answers.is_poor = False
    for batch in poor:
        ended = await end_of(bench.desk, batch, owner="poor")
        assert (ended.status, ended.state.num_completed) == (BatchStatus.COMPLETED, 3)


async def test_whose_files_and_batches_they_are(bench: Bench):
    file_id = add_file(bench.desk, lines_of(1), "me")
    batch = add_batch(bench.desk, lines_of(1), "me")
    ledger = bench.desk.ledger
    for attempt in (
        lambda: bench.desk.files.get("you", file_id),
        lambda: ledger.delete_file("you", file_id),
        lambda: ledger.create("you", input_file_id=file_id, endpoint=batch_parts.URL, completion_window="1h"),
        lambda: ledger.get("you", batch.record.id),
        lambda: ledger.cancel("you", batch.record.id),
        lambda: ledger.get("me", "../" + batch.record.id),
        lambda: bench.desk.files.get("me", "../../etc/passwd"),
    ):
        with pytest.raises(BatchRefusedError) as refusal:
            attempt()
        assert refusal.value.kind is RefusalKind.NOT_FOUND
    assert everything(bench.desk, "you") == []
    with pytest.raises(BatchRefusedError, match="cancel the batch first"):
        ledger.delete_file("me", batch.record.input_file_id)


async def test_bounds_of_each_key(bench: Bench):
    """Unfinished batches count; those that have ended make room, and another key has its own number."""
    bench.config = bench.config.model_copy(update={"max_batches_per_key": 2})
    bench.desk.ledger._config = bench.config
    batches = [add_batch(bench.desk, lines_of(1)) for _ in range(2)]
    with pytest.raises(BatchRefusedError, match="2 unfinished batches") as refusal:
        add_batch(bench.desk, lines_of(1))
    assert refusal.value.kind is RefusalKind.TOO_MANY
    add_batch(bench.desk, lines_of(1), "you")
    bench.start()
    await end_of(bench.desk, batches[0])
    add_batch(bench.desk, lines_of(1))


async def test_results_go_when_the_batch_says_so(bench: Bench):
    bench.start()
    file_id = add_file(bench.desk, lines_of(2))
    batch = bench.desk.ledger.create(
        "me", input_file_id=file_id, endpoint=batch_parts.URL, completion_window="1h", results_expire_after_s=3600
    )
    ended = await end_of(bench.desk, batch)
    record = bench.desk.files.get("me", ended.state.output_file_id)
    assert record.expires_at == record.created_at + 3600
    bench.clock.now += 3600
    with pytest.raises(BatchRefusedError):
        bench.desk.files.get("me", ended.state.output_file_id)
    assert bench.desk.files.get("me", file_id)


async def test_what_is_old_goes(bench: Bench):
    bench.start()
    batch = await end_of(bench.desk, add_batch(bench.desk, lines_of(2)))
    lost = bench.desk.files.begin("me")
    lost.write(b"x")
    bench.desk.sweep()
    assert len(bench.desk.store.names("content")) >= 2, "nothing is old yet"
    bench.clock.now += bench.config.retention_s + 1
    bench.desk.sweep()
    assert bench.desk.store.names("content") == []
    with pytest.raises(BatchRefusedError):
        bench.desk.files.get("me", batch.state.output_file_id)
    assert everything(bench.desk) == [batch]
    bench.clock.now += bench.config.max_window_s
    bench.desk.sweep()
    assert everything(bench.desk) == []


class Processes:
    """Runners in processes of their own, on a directory."""

    def __init__(self, tmp_path: Path, lease_s: float) -> None:
        self.desk = BatchDesk(open_store(str(tmp_path / "store")), BatchesConfig(store=str(tmp_path / "store")))
        self._log = tmp_path / "log"
        self._log.touch()
        self._arguments = (str(tmp_path / "store"), str(self._log), str(lease_s))
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        root = Path(__file__).parents[3]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, batch_parts.__file__, *self._arguments]
        process = subprocess.Popen(command, env=environment, cwd=root)
        self.processes[process.pid] = process

    def asked(self) -> list[tuple[int, int]]:
        """Process and line of every request so far."""
        return [tuple(map(int, text.split())) for text in self._log.read_text().splitlines()]  # type: ignore[misc]

    async def holder(self, batch: Batch, num_completed: int) -> int:
        """The process that runs the batch, once so many of its results have been kept."""
        ledger = self.desk.ledger
        await until(lambda: ledger.get("me", batch.record.id).state.num_completed >= num_completed, 120)
        return self.asked()[-1][0]


@pytest.fixture
def processes(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        made = Processes(tmp_path, lease_s=2)
        stack.callback(made.desk.close)
        yield made
        for process in made.processes.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_process_that_dies_or_freezes_is_replaced(processes: Processes, kind: signal.Signals):
    """Another process goes on from the results that were kept. One that comes back to life changes nothing."""
    num_lines = 400
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    batch = add_batch(processes.desk, lines_of(num_lines, delay_s=0.05, usage=usage))
    processes.start()
    processes.start()
    holder = await processes.holder(batch, 50)
    os.kill(holder, kind)
    ended = await end_of(processes.desk, batch)
    assert {process for process, _ in processes.asked()} == set(processes.processes)
    if kind == signal.SIGSTOP:
        os.kill(holder, signal.SIGCONT)
        again = add_batch(processes.desk, lines_of(20))
        assert (await end_of(processes.desk, again)).state.num_completed == 20
        await asyncio.sleep(2)
    assert processes.desk.ledger.get("me", batch.record.id) == ended
    assert (ended.status, ended.state.num_completed) == (BatchStatus.COMPLETED, num_lines)
    assert ended.state.usage == TokenUsage(5 * num_lines, 2 * num_lines, 3 * num_lines), "each line counts once"
    output = read_lines(processes.desk, ended.state.output_file_id)
    assert custom_ids(output) == [f"id-{n}" for n in range(num_lines)]
    assert [line["response"]["body"]["n"] for line in output] == list(range(num_lines))
    by_other = [n for process, n in processes.asked() if process != holder]
    assert len(by_other) <= num_lines - 50, "results that were kept are not made again"


async def test_a_batch_whose_file_is_gone_ends(bench: Bench):
    """Nothing could ever end it otherwise, not even its window. A store that is away is another matter."""
    gone, kept = add_batch(bench.desk, lines_of(3)), add_batch(bench.desk, lines_of(2))
    bench.desk.store.delete(f"content/{gone.record.input_file_id}")
    bench.start()
    ended = await end_of(bench.desk, gone)
    assert ended.status is BatchStatus.FAILED
    assert [fault.code for fault in ended.state.faults] == ["input_file_gone"]
    assert (await end_of(bench.desk, kept)).status is BatchStatus.COMPLETED


async def test_what_others_leave_in_the_store_holds_up_nothing(bench: Bench, serve_log):
    """Network file systems leave names of their own; disks damage objects. Neither is shown, run, or deleted."""
    store_module._note_damaged.cache_clear()
    store, first = bench.desk.store, add_batch(bench.desk, lines_of(2))
    folder = f"batches/{folder_of('me')}"
    foreign = [f"active/{NFS}", f"files/{folder_of('me')}/{NFS}", f"{folder}/{NFS}/record", f"work/{NFS}/parts/1",
               f"work/{first.record.id}/parts/{NFS}"]  # fmt: skip
    damaged = [f"active/batch_{'0' * 28}", f"{folder}/batch_{'1' * 28}/record", f"files/{folder_of('me')}/{OLD_FILE}",
               f"content/{OLD_FILE}"]  # fmt: skip
    for name in foreign + damaged:
        store.write(name, b"\x00garbage")
    bench.start()
    assert (await end_of(bench.desk, first)).status is BatchStatus.COMPLETED
    assert (await end_of(bench.desk, add_batch(bench.desk, lines_of(2)))).status is BatchStatus.COMPLETED
    assert len(everything(bench.desk)) == 2
    assert len(bench.desk.files.page("me", Page(100))[0]) == 4
    bench.desk.sweep()
    assert store.read(damaged[-1]) == store.read(damaged[-2]) == b"\x00garbage"
    said = Counter(record.getMessage().split()[0] for record in serve_log if "damaged" in record.getMessage())
    assert said[damaged[0]] == 1, "once, not with every look"


async def test_results_that_are_damaged_are_made_again(bench: Bench):
    batch = add_batch(bench.desk, lines_of(3))
    book = ResultBook(bench.desk.store, batch.record.id, lease_number=1)
    for line in range(3):
        book.add([Result(line, False, b'{"n": %d}' % line, TokenUsage(5, 2, 3, 1))])
    parts = f"work/{batch.record.id}/parts"
    first, second, _ = bench.desk.store.names(parts)
    bench.desk.store.write(f"{parts}/{first}", b"\x00")
    bench.desk.store.write(f"{parts}/{second}", bench.desk.store.read(f"{parts}/{second}")[:-1])
    bench.start()
    ended = await end_of(bench.desk, batch)
    assert (ended.status, ended.state.num_completed, sorted(bench.answers.asked)) == (BatchStatus.COMPLETED, 3, [0, 1])
