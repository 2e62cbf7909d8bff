"""Ranks of a model as threads of this process, which run in turns: what processes do, in milliseconds.

One rank runs at a time, for Triton's interpreter knows no threads; a rank gives way where it waits for the others.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import msgspec
import torch

from llm.checkpoint.adapter_slots import make_packer
from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.core.partition import Partition
from llm.models.decoder import DecoderModel
from llm.parallel.channel import Int32Array, pack_arrays, unpack_arrays
from llm.parallel.tasks import PendingTasks, Task, TaskReply
from llm.serving.adapter_copies import AdapterCopies
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.engine_setup import EngineSetup
from llm.serving.model_runner import Follower, ModelRunner
from llm.serving.parallel_runner import ParallelRunner
from llm.serving.rank_adapters import AdapterOutcome, RankAdapters, carry_out
from llm.serving.runners import make_follower, make_runner
from llm.serving.step_arrays import StepArrays

_WAIT_S = 120
_Frames = Queue[bytes | Task | None]


class Meeting:
    """Where the ranks of one model meet."""

    def __init__(self, size: int) -> None:
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=_WAIT_S)
        self.turn = threading.Lock()


class ThreadExchange:
    """The `Exchange` of a rank whose fellows are threads; it has its turn whenever it runs."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank = rank
        self._meeting = meeting
        self.num_reductions = 0

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        meeting = self._meeting
        meeting.tensors[self._rank] = tensor
        meeting.turn.release()
        try:
            meeting.barrier.wait()
            gathered = torch.stack(meeting.tensors)
            meeting.barrier.wait()
        finally:
            meeting.turn.acquire()
        return gathered

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous()
        self.num_reductions += 1
        return self.all_gather(tensor).sum(0)

    def adds(self, tensor: torch.Tensor) -> bool:
        return len(tensor) <= 2  # so that both ways are tested

    def add_all_reduce(self, tensor: torch.Tensor, total: torch.Tensor) -> None:
        total += self.all_reduce(tensor)

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = self.all_gather(tensor).movedim(0, -2).flatten(-2)
        return gathered if self._rank == 0 else torch.full_like(gathered, torch.nan)

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self.all_gather(tensor)[0])


def run_ranks(
    size: int, run: Callable[[Partition, ThreadExchange], torch.Tensor], **options: bool
) -> list[torch.Tensor]:
    """What each rank's `run` gives."""
    meeting = Meeting(size)
    results: list[torch.Tensor] = [torch.empty(0)] * size
    failures: list[BaseException] = []

    def start(rank: int) -> None:
        with meeting.turn:
            try:
                with torch.inference_mode():
                    results[rank] = run(Partition(rank, size, **options), ThreadExchange(rank, meeting))
            except BaseException as error:  # noqa: BLE001  # raised again where the ranks were started
                failures.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


class ThreadRanks:
    """What `llm.serving.ranks.Ranks` is to an engine, with threads in place of processes.

    Args:
        load: makes a rank's part of the model.
    """

    failure: str | None = None

    def __init__(self, load: Callable[[Partition], DecoderModel], config: EngineConfig) -> None:
        self._config = config
        size = config.tensor_parallel_size
        self._meeting = Meeting(size)
        self._meeting.turn.acquire()  # the engine's, whose thread this is
        self.exchanges = [ThreadExchange(rank, self._meeting) for rank in range(size)]
        self._models = [load(Partition(rank, size, config.expert_parallel)).eval() for rank in range(size)]
        for model, exchange in zip(self._models, self.exchanges, strict=True):
            model.exchange = exchange
        self.model = self._models[0]
        self._packers = [make_packer(model, config) for model in self._models]
        self._steps: list[_Frames] = []
        self._followers: list[Follower] = []
        self._copies: list[AdapterCopies] = []
        self._tasks = PendingTasks()
        self._errors: list[BaseException] = []

    def num_pool_pages(self, setup: EngineSetup) -> int:
        assert self._config.num_pages is not None
        return self._config.num_pages

    def make_runner(self, setup: EngineSetup, num_pages: int) -> ModelRunner:
        for rank, rank_model in enumerate(self._models[1:], start=1):
            steps: _Frames = Queue()
            self._steps.append(steps)
            packer = self._packers[rank]
            rank_setup = replace(setup, model=rank_model, adapters=None if packer is None else packer.layout)
            self._followers.append(follower := make_follower(rank_setup, num_pages))
            threading.Thread(target=self._follow, args=(rank, follower, steps), daemon=True).start()
        return ParallelRunner(make_runner(setup, num_pages), self)  # type: ignore

    def share_adapters(self, own: AdapterCopies) -> RankAdapters:
        for packer, follower in zip(self._packers[1:], self._followers, strict=True):
            assert packer is not None
            assert follower.adapters is not None
            self._copies.append(AdapterCopies(packer, follower.adapters, own.num_places))
        return RankAdapters(own, self)

    def _follow(self, rank: int, follower: Follower, steps: "_Frames") -> None:
        while (payload := steps.get()) is not None:
            if isinstance(payload, Task):
                self._carry_out(rank, payload)
                steps.task_done()
                continue
            with self._meeting.turn:
                try:
                    follower.follow(StepArrays(*unpack_arrays(bytearray(payload), StepArrays.num_fields())))
                except BaseException as error:  # noqa: BLE001  # raised again by `check`
                    self._errors.append(error)
                    self._meeting.barrier.abort()
                    return
                finally:
                    steps.task_done()

    def _carry_out(self, rank: int, task: Task) -> None:
        def reply(outcome: AdapterOutcome) -> None:
            self._tasks.take(rank, TaskReply(task.number, msgspec.to_builtins(outcome)))

        carry_out(self._copies[rank - 1], task.content, reply)

    # What the runner and adapters ask of a `RankGroup`:

    def begin(self, content: object) -> "Future[Sequence[Any]]":
        number, future = self._tasks.add(range(1, len(self._models)))
        self._meeting.turn.release()  # or a follower whose last step is not quite over would never begin this
        for steps in self._steps:
            steps.join()
        self._meeting.turn.acquire()
        for steps in self._steps:
            steps.put(Task(number, content))
        return future

    def call(self, name: str) -> None:
        assert name == "warm_up"

    def replies(self) -> list[int]:
        return []

    def expect_beats(self) -> None: ...

    def send_step(self, arrays: Sequence[Int32Array]) -> None:
        for steps in self._steps:
            steps.put(pack_arrays(arrays))

    def fail_step(self, error: Exception) -> None:
        self.failure = str(error)

    def check(self) -> None:
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        for steps in self._steps:
            steps.put(None)
        for copies in self._copies:
            copies.close()
        self._meeting.turn.release()


def parallel_engine(
    source: Path | Callable[[Partition], DecoderModel], tokenizer=None, **config
) -> ContinuousBatchingEngine:
    """An engine of two ranks, or as many as `config` says, of a checkpoint or of what a function makes."""
    engine_config = EngineConfig(**{"tensor_parallel_size": 2, **config})

    def load(partition: Partition) -> DecoderModel:
        return load_decoder(source, partition=partition, progress=False)

    ranks = ThreadRanks(load if isinstance(source, Path) else source, engine_config)
    return ContinuousBatchingEngine(ranks.model, tokenizer, config=engine_config, ranks=ranks)  # type: ignore
