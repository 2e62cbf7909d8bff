"""How many pages the pool gets."""

import torch

from llm.config import EngineConfig
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel
from llm.serving.engine_setup import EngineSetup
from llm.serving.runners import make_runner, prepare_weights

_CONTEXT_BYTES = 1 << 30
"""About what the driver and its libraries keep on a GPU for one process, beside what the allocator holds."""


def num_pool_pages(setup: EngineSetup) -> int:
    """Number of pages for a model on its device.

    This is `config.num_pages` if it is set. Otherwise, on a GPU, it is what `gpu_memory_utilization` leaves after the
    weights and the largest step, measured by running one; on a CPU it is what `max_batch_size` full sequences need, at
    most `cpu_pool_bytes`, including the states of rows and the slots of adapters.

    Raises:
        ConfigError: the memory cannot hold a single page.
    """
    config, page_bytes = setup.config, setup.bytes_per_page
    if config.num_pages is not None:
        return config.num_pages
    if setup.model.device.type == "cuda":
        num_pages = (_gpu_budget(setup) // page_bytes) - 1
    else:
        most_useful = setup.max_rows * len(setup.model.page_groups) * setup.table_len
        room = config.cpu_pool_bytes - setup.states_bytes - setup.adapters_bytes
        num_pages = min(room // page_bytes, most_useful)
    if num_pages < 1:
        raise ConfigError(
            f"no memory left for the KV cache: a page takes {page_bytes} bytes{_states_note(setup.model)}"
            f"{_adapters_note(setup)}; raise "
            "gpu_memory_utilization (GPU) or cpu_pool_bytes (CPU), or set num_pages"
        )
    return num_pages


def _adapters_note(setup: EngineSetup) -> str:
    """How much memory adapters take, for a message; empty if there is none for them."""
    where = " with adapter_experts" if setup.config.adapter_experts and setup.model.config.num_experts else ""
    num_bytes = setup.adapters_bytes
    return f", and max_adapters adapters of max_adapter_rank{where} {num_bytes}" if num_bytes else ""


def _states_note(model: DecoderModel) -> str:
    """What else takes memory, for a message; empty for most models."""
    state_bytes = model.held.state_bytes(model.dtype.itemsize)
    fewer = "lower max_batch_size and num_state_snapshots for fewer"
    return f", and the states of each row and snapshot {state_bytes} ({fewer})" if state_bytes else ""


def _gpu_budget(setup: EngineSetup) -> int:
    """Bytes of GPU memory for the pool, measured by running the largest step on a pool of one page.

    The measure is what the allocator has taken from the device: unused space between its blocks, and what captured
    graphs keep for themselves, is not available for pages either.
    """
    config, device = setup.config, setup.model.device
    prepare_weights(setup.model, config)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    runner = make_runner(setup, 1)
    runner.run_largest(setup.max_tokens)
    del runner
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return pool_bytes(config, total=total, free=free, reserved=torch.cuda.memory_reserved(device)) - needed


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
