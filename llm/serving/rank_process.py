"""A rank of a model as a process, `python -m llm.serving.rank_process FD`, started by rank 0's engine.

It loads its part of the model, then does what rank 0 tells it to: see `llm.serving.ranks`.
"""

import logging
import sys
import traceback
from functools import partial
from pathlib import Path

import msgspec
import torch

from llm.checkpoint.adapter_slots import make_packer
from llm.config import EngineConfig
from llm.core.partition import Partition
from llm.parallel.channel import FrameKind, unpack_arrays
from llm.parallel.exchange import join_ranks
from llm.parallel.member import Leader
from llm.parallel.tasks import Task
from llm.serving.adapter_copies import AdapterCopies
from llm.serving.engine_setup import EngineSetup
from llm.serving.memory import num_pool_pages
from llm.serving.model_loading import load_model
from llm.serving.model_runner import Follower
from llm.serving.rank_adapters import AdapterOrder, carry_out
from llm.serving.rank_settings import RankCall, RankSettings
from llm.serving.runners import make_follower
from llm.serving.step_arrays import StepArrays


class RankProcess:
    """One rank, starting from its settings.

    Args:
        leader: rank 0.
        settings: what to load, and how.
    """

    def __init__(self, leader: Leader, settings: RankSettings) -> None:
        self._leader = leader
        self._config = config = EngineConfig(**settings.config)
        partition = Partition(settings.rank, config.tensor_parallel_size, config.expert_parallel)
        device = settings.source.device_of(settings.rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(settings.num_threads)
        self._model = load_model(settings.source, partition, progress=False)
        self._packer = make_packer(self._model, config)
        leader.reply("loaded")
        self._model.exchange = join_ranks(
            partition, Path(settings.store_path), device, deterministic=config.deterministic
        )
        self._follower: Follower | None = None
        self._adapters: AdapterCopies | None = None

    def run(self) -> None:
        """Do what rank 0 says, forever: the process ends with rank 0's."""
        while True:
            kind, payload = self._leader.next_frame()
            if kind is FrameKind.STEP:
                assert self._follower is not None, "steps come behind `build`"
                self._follower.follow(StepArrays(*unpack_arrays(payload, StepArrays.num_fields())))
            elif kind is FrameKind.TASK:
                self._begin(msgspec.json.decode(payload, type=Task))
            else:
                self._leader.reply(self._answer(msgspec.json.decode(payload, type=RankCall)))

    def _begin(self, task: Task) -> None:
        assert self._adapters is not None, "tasks come behind `hold_adapters`"
        order = msgspec.convert(task.content, AdapterOrder)
        carry_out(self._adapters, order, partial(self._leader.reply_to_task, task.number))

    def _answer(self, call: RankCall) -> int:
        layout = None if self._packer is None else self._packer.layout
        setup = EngineSetup(self._model, self._config, call.context_len, layout)
        match call.name:
            case "size":
                return num_pool_pages(setup)
            case "build":
                self._follower = make_follower(setup, call.num_pages)
            case "hold_adapters":
                assert self._packer is not None, "requests choose adapters"
                assert self._follower is not None, "it comes behind `build`"
                assert self._follower.adapters is not None, "it has slots"
                self._adapters = AdapterCopies(self._packer, self._follower.adapters, call.num_places)
            case "warm_up":
                assert self._follower is not None, "it comes behind `build`"
                self._follower.warm_up()
        return 0


def main() -> None:
    """Run a rank on the socket whose file descriptor is the first argument."""
    logging.basicConfig(level=logging.WARNING)
    leader = Leader(int(sys.argv[1]))
    try:
        _, settings = leader.next_frame()
        RankProcess(leader, msgspec.json.decode(settings, type=RankSettings)).run()
    except Exception as error:  # noqa: BLE001  # the edge of a process: rank 0 reports the error
        traceback.print_exc()
        leader.fail(f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
