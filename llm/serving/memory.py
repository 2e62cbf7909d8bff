"""How many pages the pool gets."""

import torch

from llm.attention.dense import DenseContext
from llm.config import EngineConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel


def num_pool_pages(model: DecoderModel, config: EngineConfig, context_len: int) -> int:
    """Pages for this model on its device.

    `config.num_pages` where it is set. Else on a GPU what `gpu_memory_utilization` leaves beside the weights and the
    activations of the largest step, measured by running one; on a CPU what `max_batch_size` full sequences need, at
    most `cpu_pool_bytes`.

    Raises:
        ConfigError: the memory holds no page.
    """
    if config.num_pages is not None:
        return config.num_pages
    bytes_per_page = PagedKVCache.bytes_per_page(
        num_layers=model.num_layers,
        page_size=config.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.config.head_size,
        dtype=model.dtype,
    )
    if model.device.type == "cuda":
        num_pages = (_gpu_budget(model, config, context_len) // bytes_per_page) - 1
    else:
        most_useful = config.max_batch_size * -(-context_len // config.page_size)
        num_pages = min(config.cpu_pool_bytes // bytes_per_page, most_useful)
    if num_pages < 1:
        raise ConfigError(
            f"no memory left for the KV cache: a page takes {bytes_per_page} bytes; raise gpu_memory_utilization "
            "(GPU) or cpu_pool_bytes (CPU), or set num_pages"
        )
    return num_pages


@torch.inference_mode()
def _gpu_budget(model: DecoderModel, config: EngineConfig, context_len: int) -> int:
    """Bytes of GPU memory for the pool, after a trial of the largest step."""
    num_tokens = min(config.token_budget(model.device.type), context_len)
    torch.cuda.reset_peak_memory_stats(model.device)
    context = DenseContext([model.config.layer_window(layer) for layer in range(model.num_layers)])
    positions = torch.arange(num_tokens, device=model.device)
    hidden = model.hidden_states(torch.zeros_like(positions).unsqueeze(0), positions, context)
    model.logits(hidden[0, : config.max_batch_size]).float().sort(dim=-1)
    torch.cuda.synchronize(model.device)
    activations = torch.cuda.max_memory_allocated(model.device) - torch.cuda.memory_allocated(model.device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    in_use = total - free
    return int(total * config.gpu_memory_utilization) - in_use - activations
