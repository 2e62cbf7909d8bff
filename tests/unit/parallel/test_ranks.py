"""Groups of real processes: what they are sent, and that none is left behind, however the others end."""

import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from llm.errors import RankLostError
from llm.parallel import ranks
from llm.parallel.ranks import RankGroup


@pytest.fixture
def group() -> Iterator[RankGroup]:
    group = RankGroup(3, "idle_rank", {"color": "red"})
    group.call("rank")
    assert group.replies() == [[1, "red"], [2, "red"]]
    group.expect_beats()
    yield group
    group.close()


def is_there(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], most_s: float = 20.0) -> None:
    deadline = time.monotonic() + most_s
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline, f"{pids} are left behind"
        time.sleep(0.01)


def wait_until_lost(group: RankGroup, most_s: float) -> float:
    """Seconds until the group knows."""
    start = time.monotonic()
    while group.failure is None:
        assert time.monotonic() - start < most_s, "nobody noticed"
        time.sleep(0.01)
    return time.monotonic() - start


def test_steps_come_to_every_rank_in_order(group):
    for step in range(20):
        large = np.full(50_000 if step == 7 else 3, step, dtype=np.int32)
        group.send_step([large, np.empty(0, dtype=np.int32)])
    group.call("sums")
    expected = [step * (50_000 if step == 7 else 3) for step in range(20)]
    assert group.replies() == [expected, expected]


def test_tasks_begin_between_steps_and_are_done_in_any_order(group):
    first = group.begin("one")
    group.send_step([np.zeros(1, np.int32)] * 2)
    second = group.begin({"number": 2})
    last = group.begin("reply")
    group.call("sums")
    assert group.replies() == [[0], [0]]
    assert last.result(20) == [[1, "reply", 1], [2, "reply", 1]]
    assert second.result(20) == [[1, {"number": 2}, 1], [2, {"number": 2}, 1]]
    assert first.result(20) == [[1, "one", 0], [2, "one", 0]]


def test_tasks_of_ranks_that_are_lost_end(group):
    """Those that had begun, and later ones."""
    begun = group.begin("one")
    os.kill(group.process_ids[1], signal.SIGKILL)
    for future in (begun, group.begin("two")):
        with pytest.raises(RankLostError, match="rank 2 has ended"):
            future.result(20)
    with pytest.raises(RankLostError, match="rank 2 has ended"):
        group.begin("three").result(20)


def test_a_rank_that_is_killed_takes_the_others_with_it(group):
    """Though nothing is asked of them at the time."""
    pids = group.process_ids
    os.kill(pids[0], signal.SIGKILL)
    wait_until_lost(group, 5)
    assert group.failure == "rank 1 has ended, killed by signal 9"
    wait_until_gone(pids)
    with pytest.raises(RankLostError, match="rank 1 has ended"):
        group.send_step([])


def test_a_rank_that_stands_still_is_lost_within_5_s(group):
    pids = group.process_ids
    os.kill(pids[1], signal.SIGSTOP)
    assert wait_until_lost(group, 20) < 5.5
    assert group.failure == "rank 2 has been silent for 4 s"
    wait_until_gone(pids)


def test_a_rank_says_why_it_ends(group):
    with suppress(RankLostError):  # the first may be done before the second is asked
        group.call("fail")
    wait_until_lost(group, 5)
    assert "failed: ValueError: no" in group.failure
    with pytest.raises(RankLostError, match="failed: ValueError: no"):
        group.replies()
    wait_until_gone(group.process_ids)


def test_a_step_that_is_never_done_is_a_lost_rank(group, monkeypatch):
    """All ranks give signs of life, but one does not come to a collective."""

    class Never:
        def query(self) -> bool:
            return False

    monkeypatch.setattr(ranks, "STEP_TIMEOUT_S", 0.2)
    with pytest.raises(RankLostError, match="a rank hangs"):
        group.wait_for(Never())
    wait_until_gone(group.process_ids)


def test_no_rank_outlives_rank_0(group):
    """Rank 0 of the other group is killed, and has no time to say anything."""
    group.call("lead")
    theirs = [pid for pids in group.replies() for pid in pids]
    assert len(theirs) == 4
    assert all(map(is_there, theirs))
    for pid in group.process_ids:
        os.kill(pid, signal.SIGKILL)
    wait_until_gone(theirs)


def test_rank_0_does_not_wait_for_a_lost_rank_for_ever_while_ranks_start(group):
    """On GPUs a collective that somebody does not join cannot be given up, only the process can."""
    group.call("wait")
    wait_until_lost(group, 20)
    assert group.failure in {f"rank {rank} has ended with exit code 1" for rank in (1, 2)}


@pytest.mark.parametrize("way", ["closed", "dropped"])
def test_an_orderly_end_is_silent(way, caplog):
    """Ranks end by themselves, with exit code 0, and nobody complains."""
    group = RankGroup(2, "idle_rank", {"color": "red"})
    group.call("rank")
    assert group.replies() == [[1, "red"]]
    processes = [rank.process for rank in group._ranks]
    if way == "closed":
        group.close()
        assert group.failure is None
    del group
    gc.collect()
    assert [process.wait(20) for process in processes] == [0]
    assert caplog.text == ""


def test_multicast_is_off_in_every_process(group):
    for pid in [os.getpid(), *group.process_ids]:
        if pid != os.getpid():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for setting in (b"NCCL_NVLS_ENABLE=0", b"TORCH_SYMM_MEM_DISABLE_MULTICAST=1", b"NVSHMEM_DISABLE_NVLS=1"):
                assert setting in environment
        else:
            assert os.environ["NCCL_NVLS_ENABLE"] == "0"
