"""Which runner a model gets on its device."""

from llm.attention.backends import TRITON, choose_backend, make_backend
from llm.config import EngineConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.models.decoder import DecoderModel
from llm.serving.model_runner import EagerRunner, ModelRunner


def make_runner(model: DecoderModel, config: EngineConfig, *, num_pages: int, context_len: int) -> ModelRunner:
    """What runs the steps, with memory for `num_pages` pages on the model's device.

    Raises:
        ConfigError: the attention backend asked for is unknown or does not run on this device.
    """
    backend = choose_backend(config.attention_backend, model.device)
    kv_cache = PagedKVCache(
        num_layers=model.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.config.head_size,
        device=model.device,
        dtype=model.dtype,
    )
    if backend == TRITON:
        from llm.serving.graph_runner import GraphRunner  # triton is there on GPU machines only

        return GraphRunner(
            model,
            kv_cache,
            max_rows=config.batch_size(model.device.type),
            max_tokens=config.token_budget(model.device.type),
            max_seq_len=context_len,
        )
    return EagerRunner(model, kv_cache, make_backend(backend), max_rows=config.batch_size(model.device.type))
