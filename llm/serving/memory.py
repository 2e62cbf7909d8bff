"""How many pages the pool gets."""

import torch

from llm.config import EngineConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.errors import ConfigError
from llm.models.adapters import AdapterLayout
from llm.models.decoder import DecoderModel
from llm.serving.runners import kv_cache_dtype, make_runner, num_snapshots, prepare_weights, table_len

_CONTEXT_BYTES = 1 << 30
"""About what the driver and its libraries keep on a GPU for one process, beside what the allocator holds."""


def num_pool_pages(
    model: DecoderModel, config: EngineConfig, context_len: int, adapters: AdapterLayout | None = None
) -> int:
    """Number of pages for this model on its device.

    This is `config.num_pages` if it is set. Otherwise, on a GPU, it is what `gpu_memory_utilization` leaves after the
    weights and the largest step, measured by running one; on a CPU it is what `max_batch_size` full sequences need, at
    most `cpu_pool_bytes`, including the states of rows and the slots of adapters.

    Args:
        adapters: what the slots of `max_adapters` adapters hold; None if requests cannot choose one.

    Raises:
        ConfigError: the memory cannot hold a single page.
    """
    if config.num_pages is not None:
        return config.num_pages
    bytes_per_page = PagedKVCache.bytes_per_page(
        model.page_groups,
        page_size=config.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.config.head_size,
        has_values=model.config.latent is None,
        dtype=kv_cache_dtype(model, config),
    )
    if model.device.type == "cuda":
        num_pages = (_gpu_budget(model, config, context_len, adapters) // bytes_per_page) - 1
    else:
        pages_a_row = len(model.page_groups) * table_len(config, context_len)
        most_useful = config.batch_size("cpu") * pages_a_row
        room = config.cpu_pool_bytes - states_bytes(model, config) - adapters_bytes(model, config, adapters)
        num_pages = min(room // bytes_per_page, most_useful)
    if num_pages < 1:
        raise ConfigError(
            f"no memory left for the KV cache: a page takes {bytes_per_page} bytes{_states_note(model)}"
            f"{_adapters_note(model, config, adapters)}; raise "
            "gpu_memory_utilization (GPU) or cpu_pool_bytes (CPU), or set num_pages"
        )
    return num_pages


def states_bytes(model: DecoderModel, config: EngineConfig) -> int:
    """Bytes of the states of all rows and snapshots on the model's device."""
    num_rows = config.batch_size(model.device.type) + 1
    return (num_rows + num_snapshots(model, config)) * model.held.state_bytes(model.dtype.itemsize)


def adapters_bytes(model: DecoderModel, config: EngineConfig, adapters: AdapterLayout | None) -> int:
    """Bytes of the slots of adapters on the model's device."""
    return 0 if adapters is None else config.max_adapters * adapters.size * model.dtype.itemsize


def _adapters_note(model: DecoderModel, config: EngineConfig, adapters: AdapterLayout | None) -> str:
    """How much memory adapters take, for a message; empty if there is none for them."""
    num_bytes = adapters_bytes(model, config, adapters)
    where = " with adapter_experts" if config.adapter_experts and model.config.num_experts else ""
    return f", and max_adapters adapters of max_adapter_rank{where} {num_bytes}" if num_bytes else ""


def _states_note(model: DecoderModel) -> str:
    """What else takes memory, for a message; empty for most models."""
    state_bytes = model.held.state_bytes(model.dtype.itemsize)
    fewer = "lower max_batch_size and num_state_snapshots for fewer"
    return f", and the states of each row and snapshot {state_bytes} ({fewer})" if state_bytes else ""


def _gpu_budget(model: DecoderModel, config: EngineConfig, context_len: int, adapters: AdapterLayout | None) -> int:
    """Bytes of GPU memory for the pool, measured by running the largest step on a pool of one page.

    The measure is what the allocator has taken from the device: unused space between its blocks, and what captured
    graphs keep for themselves, is not available for pages either.
    """
    prepare_weights(model, config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_reserved(model.device)
    runner = make_runner(model, config, num_pages=1, context_len=context_len, adapters=adapters)
    runner.run_largest(config.token_budget(model.device.type))
    del runner
    torch.cuda.synchronize(model.device)
    needed = torch.cuda.max_memory_reserved(model.device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    return pool_bytes(config, total=total, free=free, reserved=torch.cuda.memory_reserved(model.device)) - needed


def pool_bytes(config: EngineConfig, *, total: int, free: int, reserved: int) -> int:
    """Bytes of a GPU that are left for the pool and for steps.

    On a GPU of its own, everything that is in use counts as the engine's: the driver knows more of it than the
    allocator. On a shared one, what others use is not its own, and it may take no more than what they leave.

    Args:
        total: bytes of the GPU.
        free: of these, bytes that nobody uses.
        reserved: bytes that this process's allocator holds.
    """
    if config.gpu_share is None:
        return int(total * config.gpu_memory_utilization) - (total - free)
    own = reserved + _CONTEXT_BYTES
    return min(int(total * config.gpu_share * config.gpu_memory_utilization) - own, free)
