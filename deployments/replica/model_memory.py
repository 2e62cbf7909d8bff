"""How much memory a model needs on each GPU of a replica, computed before it is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.model_config import ServedModelConfig
from llm.config import ModelConfig
from llm.core.page_groups import layers_per_page, page_groups_of
from llm.errors import ConfigError

if TYPE_CHECKING:
    from llm.core.partition import Partition
    from llm.models.decoder import DecoderModel

GIB = 1 << 30
_WORKSPACE_BYTES = 2 * GIB
"""Approximate memory that activations, CUDA graphs and the CUDA context need on a GPU."""
_FEWEST_SLOTS = 8192
"""Smallest useful number of slots in a pool; for a model with a shorter context it is the context length."""
_MOST_GPUS = 64


@dataclass(frozen=True, slots=True)
class GPUShare:
    """The memory of one model on each GPU of a replica.

    Attributes:
        num_gpus: number of GPUs of the replica.
        weight_bytes: bytes of the GPU's part of the weights.
        state_bytes: bytes of the states of all rows and snapshots.
        slot_bytes: bytes of one token's keys and values.
        adapter_bytes: bytes of the GPU's part of all adapters that requests may choose at once.
    """

    num_gpus: int
    weight_bytes: int
    state_bytes: int
    slot_bytes: int
    adapter_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are needed whatever the pool holds."""
        return self.weight_bytes + self.state_bytes + self.adapter_bytes

    def num_slots(self, usable_bytes: float) -> int:
        """Tokens that the pool has room for if a GPU may use so many bytes; below 1 if the rest does not fit."""
        return int((usable_bytes - self.fixed_bytes - _WORKSPACE_BYTES) // self.slot_bytes)

    def usable_bytes(self, num_slots: int) -> int:
        """Bytes that a GPU must be allowed to use for a pool of so many tokens."""
        return self.fixed_bytes + _WORKSPACE_BYTES + num_slots * self.slot_bytes


def slot_bytes(model: ModelConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values, or latents, in all layers with attention.

    Layers with a window and those without have pages of the same size, some of which have places that no layer uses.
    """
    groups = page_groups_of(model)
    return len(groups) * layers_per_page(groups) * model.slot_width * itemsize


def weight_bytes(model: ModelConfig, itemsize: int, num_gpus: int = 1, *, by_expert: bool = False) -> int:
    """Bytes of the weights on each of so many GPUs; an unquantized number takes `itemsize` bytes.

    Args:
        by_expert: whether experts are split by expert, not by column.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    from llm.core.partition import Partition

    return _num_bytes(_part_of(model, itemsize, Partition(0, num_gpus, by_expert)))


def _part_of(model: ModelConfig, itemsize: int, partition: "Partition") -> "DecoderModel":
    """A GPU's part of the model, without memory."""
    import torch

    from llm.models.decoder import DecoderModel

    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    return DecoderModel.from_config(model, device="meta", dtype=dtype, partition=partition)


def _num_bytes(part: "DecoderModel") -> int:
    return sum(weight.nbytes for weight in part.parameters())


def share_of(app: ServedModelConfig, model: ModelConfig, num_gpus: int) -> GPUShare:
    """The share of each of so many GPUs, with everything else as configured.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    from llm.core.partition import Partition  # this and the next import PyTorch, which the rest does not need
    from llm.models.cuts import held_shape

    partition = Partition(0, num_gpus, by_expert=app.engine.expert_parallel)
    held, itemsize = held_shape(model, partition), itemsize_of(app)
    kv_itemsize = 1 if app.engine.kv_cache_dtype == "fp8" else itemsize
    part = _part_of(model, itemsize, partition)
    return GPUShare(
        num_gpus,
        _num_bytes(part),
        (app.engine.batch_size("cuda") + num_snapshots_of(app, model)) * held.state_bytes(itemsize),
        slot_bytes(held, kv_itemsize),
        _adapter_bytes(app, part),
    )


def _adapter_bytes(app: ServedModelConfig, part: "DecoderModel") -> int:
    """Bytes of the slots of adapters on a GPU that holds this part of the model."""
    from llm.checkpoint.adapter_slots import make_packer

    packer = make_packer(part, app.engine)
    return 0 if packer is None else app.engine.max_adapters * packer.layout.size * itemsize_of(app)


def num_snapshots_of(app: ServedModelConfig, model: ModelConfig) -> int:
    """Snapshots of states that the prefix cache keeps on a GPU."""
    return app.engine.num_snapshots("cuda", model.state_bytes(itemsize_of(app)))


def itemsize_of(app: ServedModelConfig) -> int:
    """Bytes of one number on a GPU, if weights have no format of their own."""
    return 4 if app.dtype == "float32" else 2


def fewest_slots(app: ServedModelConfig, model: ModelConfig) -> int:
    """Tokens that a pool should hold at least."""
    return min(app.engine.max_seq_len or model.max_seq_len, _FEWEST_SLOTS)


def fewest_gpus(app: ServedModelConfig, model: ModelConfig, gpu_bytes: float) -> GPUShare | None:
    """The shares with the fewest GPUs of this size that can serve a model; None if no number can."""
    usable, num_gpus = gpu_bytes * app.engine.gpu_memory_utilization, 1
    while num_gpus <= _MOST_GPUS:
        try:
            share = share_of(app, model, num_gpus)
        except ConfigError:  # a number that does not divide it; none that is larger does
            return None
        if share.num_slots(usable) >= fewest_slots(app, model):
            return share
        num_gpus *= 2
    return None


def check_fits(app: ServedModelConfig, model: ModelConfig, gpu_bytes: int) -> None:
    """Refuse a model whose weights alone exceed what a GPU may hold, before any of them is read.

    Args:
        gpu_bytes: memory of each of the replica's GPUs, or the replica's share of it.

    Raises:
        ConfigError: they do, or the model cannot be split as configured; the message says what would work.
    """
    num_gpus, utilization = app.engine.tensor_parallel_size, app.engine.gpu_memory_utilization
    share = share_of(app, model, num_gpus)
    needed = share.fixed_bytes
    # Weights that are rounded to 8 bits are first read in their own format, while the GPU holds nothing else.
    if needed <= gpu_bytes * (utilization if app.engine.quantization is None else 1):
        return
    enough = share.usable_bytes(fewest_slots(app, model)) / utilization / GIB
    ways = [f"GPUs of {enough:.0f} GiB"]
    also = " (with room for max_adapters adapters)" if share.adapter_bytes else ""
    more = fewest_gpus(app, model, gpu_bytes)
    if more is not None:
        ways.insert(0, f"engine.tensor_parallel_size: {more.num_gpus}, for as many GPUs of this size a replica")
    raise ConfigError(
        f"{app.model_name} does not fit: {needed / GIB:.1f} GiB of weights on each GPU{also}, which has "
        f"{gpu_bytes / GIB:.1f} GiB and may use {utilization:g} of it; what would do: {', or '.join(ways)}"
    )
