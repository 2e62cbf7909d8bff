"""Entries wait on the router's node, and outlive a router that is killed."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from usage_entries import entry

from deployments.usage.entries import KILLED, REFUSED, Entry, UsageQuery
from deployments.usage.ledger import open_record
from deployments.usage.open_requests import MAX_CONTENT_BYTES, OpenRequests, last_number, left_open
from deployments.usage.spool import FileSpool, orphans
from llm.errors import ConfigError

PROGRAM = Path(__file__).parent / "spooling_process.py"
ALL = UsageQuery("0001-01-01", "9999-12-31")


def everything(spool: FileSpool) -> list[Entry]:
    found = []
    while batch := spool.batch():
        found += batch
        spool.drop_batch()
    return found


def left_by_others(directory: Path) -> list[Entry]:
    found = []
    for spool in orphans(directory):
        found += everything(spool)
        spool.close()
    return found


def kill_after(directory: Path, num_lines: int) -> list[dict]:
    """Start the program, kill it once it has written so many lines, and return all it wrote."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(PROGRAM.parent)])}
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory)], stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(num_lines)]
        child.kill()
        lines += child.stdout.readlines()
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


@pytest.mark.parametrize("num_lines", [1, 9, 10, 11, 57, 400])
def test_a_killed_process_loses_nothing_and_counts_nothing_twice(tmp_path: Path, num_lines: int):
    """What it told is recorded: ended requests as they ended, open ones with what they had generated."""
    told = kill_after(tmp_path, num_lines)
    ended = {line["opened"] for line in told if "ended" in line}
    generated = {line["opened"]: line["generated"] for line in told if "generated" in line}
    found = left_by_others(tmp_path)
    by_number = {one.opened: one for one in found}
    assert len(by_number) == len(found), "one entry a request"
    assert [one.seq for one in found] == sorted({one.seq for one in found}), "numbered in order"
    assert ended <= {one.opened for one in found if one.outcome == "stop"}
    for opened, count in generated.items():
        one = by_number[opened]
        assert one.prompt_tokens == opened
        assert one.output_tokens >= count, "what a client may have seen"
        if one.outcome == KILLED:
            assert one.output_tokens <= count + 1
            assert one.at.timestamp() == 1.0, "when it generated last, not when it was found"
    assert max(by_number) <= max(generated) + 1
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_whoever_takes_over_may_be_killed_too(tmp_path: Path):
    """Before it has delivered, after a part of it, and after all of it but the end."""
    kill_after(tmp_path, 200)
    record = open_record(None)
    [first] = list(orphans(tmp_path))
    batch = list(first.batch())
    record.append(batch[: len(batch) // 2])
    assert list(orphans(tmp_path)) == [], "nobody else takes it meanwhile"
    os.close(first._fd)  # what the kernel does for a killed process
    [again] = list(orphans(tmp_path))
    second = everything(again)
    os.close(again._fd)
    record.append(second)
    record.append(left_by_others(tmp_path))
    assert second == batch
    assert sum(row.num_requests for row in record.rows(ALL)) == len(batch)


def test_an_entry_is_in_the_file_before_add_returns(tmp_path: Path):
    spool = FileSpool.create(tmp_path)
    number = spool.open(entry(0, opened=1, outcome=KILLED), 0.0)
    spool.add(entry(1), number)
    [path] = tmp_path.glob("*.spool")
    assert path.read_bytes().endswith(b"}\n")
    assert list(left_open(path.with_suffix(".open").read_bytes())) == []
    assert list(orphans(tmp_path)) == [], "its router lives"
    spool.close()
    assert left_by_others(tmp_path) == [entry(1)]


def test_batches_stay_until_they_are_dropped_and_files_stay_small(tmp_path: Path):
    spool = FileSpool.create(tmp_path)
    [path] = tmp_path.glob("*.spool")
    for seq in range(1, 8001):
        spool.add(entry(seq), None)
    assert spool.batch() == spool.batch()
    assert 0 < len(spool.batch()) < 8000
    assert [one.seq for one in everything(spool)] == list(range(1, 8001))
    assert path.stat().st_size == 0
    spool.add(entry(8001), None)
    assert everything(spool) == [entry(8001)]
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_numbers_go_on_rising_after_everything_was_delivered(tmp_path: Path):
    """Otherwise the record would take an entry that is found later for one that it has."""
    spool = FileSpool.create(tmp_path)
    [path] = tmp_path.glob("*.spool")
    spool.open(entry(0, opened=90_000, outcome=KILLED), 5.0)
    for seq in range(1, 6001):
        spool.add(entry(seq), None)
    everything(spool)
    assert path.stat().st_size == 0
    os.close(spool._fd)
    [found] = left_by_others(tmp_path)
    assert (found.seq, found.opened, found.outcome) == (6001, 90_000, KILLED)


def test_refusals_that_are_still_being_counted_are_found_with_their_number(tmp_path: Path):
    spool = FileSpool.create(tmp_path)
    counted = spool.open(entry(0, opened=1, outcome=REFUSED, reason="tokens", num_requests=0), 1.0)
    spool.open(entry(0, opened=2, outcome=REFUSED, reason="requests", num_requests=0), 1.0)
    assert counted is not None
    spool.note(counted, 12, 2.0)
    os.close(spool._fd)
    [found] = left_by_others(tmp_path)
    assert (found.reason, found.num_requests, found.output_tokens) == ("tokens", 12, 5)


def test_a_torn_line_counts_as_never_written(tmp_path: Path):
    spool = FileSpool.create(tmp_path)
    number = spool.open(entry(0, opened=7, outcome=KILLED, output_tokens=0), 0.0)
    assert number is not None
    spool.note(number, 3, 1.0)
    [path] = tmp_path.glob("*.spool")
    with path.open("ab") as file:
        file.write(b'{"writer":"w1","seq":1,"opened":7,"at"')
    os.close(spool._fd)
    [found] = left_by_others(tmp_path)
    assert (found.opened, found.outcome, found.output_tokens) == (7, KILLED, 3)


def test_a_line_that_is_no_entry_holds_up_no_other(tmp_path: Path):
    path = tmp_path / "damaged.spool"
    path.write_bytes(b"\x00\xff\n{}\n[1]\n" + b"x" * 300_000 + b"\n")
    assert left_by_others(tmp_path) == []
    assert not path.exists()


class Disk:
    """A spool's disk, which may be full."""

    def __init__(self, spool: FileSpool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = True
        write = os.write

        def write_a_part(fd: int, data: bytes) -> int:
            if self.is_full and fd == spool._fd:
                write(fd, data[:9])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, data)

        monkeypatch.setattr(os, "write", write_a_part)


def test_what_a_full_disk_refuses_waits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve_log):
    spool = FileSpool.create(tmp_path)
    disk = Disk(spool, monkeypatch)
    number = spool.open(entry(0, opened=1, outcome=KILLED), 0.0)
    spool.add(entry(1), number)
    spool.add(entry(2), None)
    [path] = tmp_path.glob("*.spool")
    assert path.read_bytes() == b""
    assert len(list(left_open(path.with_suffix(".open").read_bytes()))) == 1, "the open one is still protected"
    assert len(serve_log) == 1, "one line, not one for each request"
    disk.is_full = False
    assert [one.seq for one in everything(spool)] == [1, 2], "there is room, and nothing else need happen first"
    assert path.read_bytes().count(b"\n") == 2
    assert list(left_open(path.with_suffix(".open").read_bytes())) == []


def test_what_a_full_disk_refuses_is_delivered_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The record may be on another machine; each entry is delivered once, in order, whenever there is room again."""
    spool = FileSpool.create(tmp_path)
    spool.add(entry(1), None)
    disk = Disk(spool, monkeypatch)
    number = spool.open(entry(0, opened=2, outcome=KILLED), 0.0)
    spool.add(entry(2), number)
    assert spool.batch() == [entry(1)]
    spool.drop_batch()
    spool.add(entry(3), None)
    assert spool.batch() == spool.batch() == [entry(2), entry(3)]
    spool.add(entry(4), None)
    spool.drop_batch()
    [path] = tmp_path.glob("*.spool")
    assert list(left_open(path.with_suffix(".open").read_bytes())) == []
    assert spool.batch() == [entry(4)]
    disk.is_full = False
    spool.add(entry(5), None)
    spool.drop_batch()
    assert [one.seq for one in everything(spool)][-1] == 5
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_slots_grow_and_are_used_again(tmp_path: Path):
    slots = OpenRequests(tmp_path / "slots")
    numbers = [slots.open(f"request {i}".encode(), 0.0) for i in range(300)]
    assert len(set(numbers)) == 300
    assert None not in numbers
    for i, number in enumerate(numbers):
        slots.note(number, i, float(i))
    slots.note_last(77)
    found = {content: (count, at) for content, count, at in left_open((tmp_path / "slots").read_bytes())}
    assert found == {f"request {i}".encode(): (i, float(i)) for i in range(300)}
    assert last_number((tmp_path / "slots").read_bytes()) == 77
    size = (tmp_path / "slots").stat().st_size
    for number in numbers:
        slots.free(number)
    assert list(left_open((tmp_path / "slots").read_bytes())) == []
    assert {slots.open(b"again", 0.0) for _ in range(300)} == set(numbers)
    assert (tmp_path / "slots").stat().st_size == size
    assert slots.open(b"x" * (MAX_CONTENT_BYTES + 1), 0.0) is None
    slots.close()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"accounts\.spool: .*file/spool"):
        FileSpool.create(tmp_path / "file" / "spool")


def test_a_file_that_somebody_else_has_locked_is_left_alone(tmp_path: Path):
    spool = FileSpool.create(tmp_path)
    spool.add(entry(1), None)
    [path] = tmp_path.glob("*.spool")
    with path.open("ab") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert everything(spool) == [entry(1)]
