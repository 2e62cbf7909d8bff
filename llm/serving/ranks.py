"""How an engine gets its ranks, and a runner that makes them run its steps."""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from llm.checkpoint.loading import Progress
from llm.config import EngineConfig
from llm.core.partition import Partition
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel
from llm.parallel.collectives import Collectives
from llm.parallel.exchange import join_ranks
from llm.parallel.ranks import RankGroup
from llm.serving.adapter_copies import AdapterCopies
from llm.serving.engine_setup import EngineSetup
from llm.serving.memory import num_pool_pages
from llm.serving.model_loading import ModelSource, load_model
from llm.serving.model_runner import ModelRunner
from llm.serving.parallel_runner import ParallelRunner
from llm.serving.rank_adapters import RankAdapters
from llm.serving.rank_settings import RankSettings
from llm.serving.runners import make_runner

_MODULE = "llm.serving.rank_process"


class Ranks:
    """The ranks of an engine's model other than rank 0, which is the engine's own process.

    They are processes that load their parts while this one loads its own. Close or drop this object to end them.

    Args:
        source: of the model.
        config: of the engine; `tensor_parallel_size` says how many ranks there are.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """

    def __init__(self, source: ModelSource, config: EngineConfig) -> None:
        size, device = config.tensor_parallel_size, source.device_of(0)
        self.partition = Partition(0, size, config.expert_parallel)
        self._config = config
        if device.type == "cuda":
            num_gpus = torch.cuda.device_count() - device.index
            if num_gpus < size:
                raise ConfigError(
                    f"tensor_parallel_size {size}: this process sees {num_gpus} GPU(s); give it as many, or lower it"
                )
        self._device = device
        scratch = tempfile.mkdtemp(prefix="rayline-ranks-")
        weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        self._store_path = Path(scratch) / "store"
        settings = RankSettings(
            rank=0, source=source, config=config.model_dump(), store_path=str(self._store_path),
            num_threads=max(torch.get_num_threads() // size, 1),
        )  # fmt: skip
        self.group = RankGroup(size, _MODULE, msgspec.to_builtins(settings), on_gpus=device.type == "cuda")
        self._exchanges: list[Collectives] = []
        self._finalizer = weakref.finalize(self, _close, self.group, self._exchanges)

    @property
    def failure(self) -> str | None:
        """Why no further step can run; None while all is well."""
        return self.group.failure

    def join(self, model: DecoderModel) -> None:
        """Connect this rank's part of the model with the others, once they have loaded theirs.

        Raises:
            RankLostError: one of them could not.
        """
        self.group.replies()
        exchange = join_ranks(self.partition, self._store_path, self._device, deterministic=self._config.deterministic)
        self._exchanges.append(exchange)
        model.exchange = exchange

    def num_pool_pages(self, setup: EngineSetup) -> int:
        """Number of pages that every rank has room for."""
        self.group.call("size", context_len=setup.context_len)
        own = num_pool_pages(setup)
        others: Sequence[int] = self.group.replies()
        return min(own, *others)

    def make_runner(self, setup: EngineSetup, num_pages: int) -> ModelRunner:
        """Make this rank's runner, which has the others run its steps."""
        self.group.call("build", num_pages=num_pages, context_len=setup.context_len)
        runner = make_runner(setup, num_pages, wait=self.group.wait_for)
        self.group.replies()
        return ParallelRunner(runner, self.group)

    def share_adapters(self, own: AdapterCopies) -> RankAdapters:
        """Have the other ranks hold their parts of the adapters that this one holds."""
        self.group.call("hold_adapters", num_places=own.num_places)
        self.group.replies()
        return RankAdapters(own, self.group)

    def close(self) -> None:
        """End all ranks; does nothing the second time."""
        self._finalizer()


def _close(group: RankGroup, exchanges: Sequence[Collectives]) -> None:
    group.close()
    for exchange in exchanges:
        exchange.close()


def load_with_ranks(
    source: ModelSource, config: EngineConfig, *, progress: Progress = True
) -> tuple[DecoderModel, Ranks | None]:
    """Load a model, as `load_model` does; or rank 0's part of it, and start the ranks with the other parts.

    Raises:
        CheckpointError, ConfigError, RankLostError: what is wrong.
    """
    if config.tensor_parallel_size == 1:
        return load_model(source, progress=progress), None
    ranks = Ranks(source, config)
    try:
        model = load_model(source, ranks.partition, progress=progress)
        ranks.join(model)
    except BaseException:
        ranks.close()
        raise
    return model, ranks
