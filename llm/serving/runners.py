"""Chooses a model's runner on its device, and its formats."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llm.attention.backends import TRITON, choose_backend, make_backend
from llm.config import EngineConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.errors import ConfigError
from llm.models.adapters import AdapterLayout, AdapterMemory
from llm.models.cache_scales import fold_cache_scales
from llm.models.decoder import DecoderModel
from llm.models.latent import unpack_latent_heads
from llm.models.quantized import quantized_modules
from llm.serving.checks import check_quantization
from llm.serving.eager_follower import EagerFollower
from llm.serving.eager_model import EagerModel
from llm.serving.eager_runner import EagerRunner
from llm.serving.model_runner import Follower, ModelRunner

if TYPE_CHECKING:
    from llm.serving.graph_model import GraphModel

_FP8_CHECKPOINT = "a checkpoint in fp8"


def make_runner(
    model: DecoderModel,
    config: EngineConfig,
    *,
    num_pages: int,
    context_len: int,
    wait: Callable[[torch.cuda.Event], None] | None = None,
    adapters: AdapterLayout | None = None,
) -> ModelRunner:
    """Make the runner, with memory for `num_pages` pages on the model's device. Prepares the weights if necessary.

    Args:
        wait: see `GraphRunner`.
        adapters: what a slot of `max_adapters` adapters holds; None if requests cannot choose one.

    Raises:
        ConfigError: the requested attention backend is unknown or does not run on this device, or the configuration
            asks for something it cannot do.
    """
    prepared = _prepare(model, config, num_pages, context_len, adapters)
    if isinstance(prepared, EagerModel):
        return EagerRunner(prepared)
    from llm.serving.graph_runner import GraphRunner  # triton is installed only on GPU machines

    return GraphRunner(prepared, wait=wait)


def make_follower(
    model: DecoderModel,
    config: EngineConfig,
    *,
    num_pages: int,
    context_len: int,
    adapters: AdapterLayout | None = None,
) -> Follower:
    """Make what runs the steps of `make_runner`'s runner on another rank."""
    prepared = _prepare(model, config, num_pages, context_len, adapters)
    if isinstance(prepared, EagerModel):
        return EagerFollower(prepared, table_len(config, context_len))
    from llm.serving.graph_follower import GraphFollower

    return GraphFollower(prepared)


def num_snapshots(model: DecoderModel, config: EngineConfig) -> int:
    """Number of state snapshots, the same on every rank."""
    return config.num_snapshots(model.device.type, model.config.state_bytes(model.dtype.itemsize))


def table_len(config: EngineConfig, context_len: int) -> int:
    """Pages of the longest sequence."""
    return -(-context_len // config.page_size)


def _prepare(
    model: DecoderModel, config: EngineConfig, num_pages: int, context_len: int, adapters: AdapterLayout | None
) -> "EagerModel | GraphModel":
    """Prepare the weights, allocate the pool's memory, and make what runs the model's part of steps."""
    backend, device_type = choose_backend(config.attention_backend, model.device), model.device.type
    prepare_weights(model, config)
    model.fit_context(context_len)
    kv_cache = PagedKVCache(
        model.page_groups,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.config.head_size,
        has_values=model.config.latent is None,
        device=model.device,
        dtype=kv_cache_dtype(model, config),
    )
    memory = None if adapters is None else AdapterMemory(model, adapters, config.max_adapters, model.dtype)
    if backend != TRITON:
        return EagerModel(
            model, kv_cache, make_backend(backend), max_rows=config.batch_size(device_type),
            num_snapshots=num_snapshots(model, config), adapters=memory,
        )  # fmt: skip
    from llm.serving.graph_model import GraphModel

    return GraphModel(
        model,
        kv_cache,
        max_rows=config.batch_size(device_type),
        max_tokens=config.token_budget(device_type),
        table_len=table_len(config, context_len),
        max_draws_per_row=1 + config.num_speculative_tokens,
        deterministic=config.deterministic,
        num_snapshots=num_snapshots(model, config),
        adapters=memory,
    )


def prepare_weights(model: DecoderModel, config: EngineConfig) -> None:
    """Convert the weights in place to the format that the configuration asks for; a second call changes nothing.

    Raises:
        ConfigError: the configuration asks for something that this backend, device or model cannot do.
    """
    _check_formats(model, config)
    unpack_latent_heads(model)
    if choose_backend(config.attention_backend, model.device) != TRITON:
        return
    from llm.models.quantize import is_rounded, quantize_weights

    if config.kv_cache_dtype == "fp8":
        fold_cache_scales(model)
    if config.quantization == "fp8":
        quantize_weights(model)
    elif is_rounded(model):
        raise ConfigError("this model's weights were rounded to 8 bits by another engine; load it again, or set fp8")
    for _, module in quantized_modules(model):
        module.join()


def kv_cache_dtype(model: DecoderModel, config: EngineConfig) -> torch.dtype:
    """Format of the pool's keys and values."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else model.dtype


def _check_formats(model: DecoderModel, config: EngineConfig) -> None:
    backend, device = choose_backend(config.attention_backend, model.device), model.device
    uses_fp8 = {
        "quantization: fp8": config.quantization == "fp8",
        "kv_cache_dtype: fp8": config.kv_cache_dtype == "fp8",
    }
    num_bits = {module.weight_format.num_bits for _, module in quantized_modules(model)}
    check_quantization(model.config, config)
    if backend == TRITON:
        uses_fp8[_FP8_CHECKPOINT] = 8 in num_bits and config.quantization is None
    asked = [name for name, is_asked in uses_fp8.items() if is_asked]
    if backend != TRITON:
        asked += ["deterministic: true"] if config.deterministic else []
        if asked:
            raise ConfigError(
                f"{', '.join(asked)}: only attention_backend 'triton' on a GPU can; {backend!r} on {device} cannot: "
                "leave it out"
            )
    elif asked and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"{', '.join(asked)}: needs a GPU of compute capability 8.9 or more; leave it out")
    needs_16_bits = [name for name in asked if name in ("quantization: fp8", _FP8_CHECKPOINT)]
    if needs_16_bits and model.dtype.itemsize != 2:
        raise ConfigError(
            f"{needs_16_bits[0]} needs a model in bfloat16 or float16, not {model.dtype}; load it as such"
        )
