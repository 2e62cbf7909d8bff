"""Chooses a model's runner on its device, and its formats."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llm.attention.backends import TRITON, choose_backend, make_backend
from llm.config import EngineConfig
from llm.errors import ConfigError
from llm.models.adapters import AdapterMemory
from llm.models.cache_scales import fold_cache_scales
from llm.models.decoder import DecoderModel
from llm.models.latent import unpack_latent_heads
from llm.models.quantized import quantized_modules
from llm.serving.checks import check_quantization
from llm.serving.eager_follower import EagerFollower
from llm.serving.eager_model import EagerModel
from llm.serving.eager_runner import EagerRunner
from llm.serving.engine_setup import EngineSetup
from llm.serving.model_runner import Follower, ModelRunner

if TYPE_CHECKING:
    from llm.serving.graph_model import GraphModel

_FP8_CHECKPOINT = "a checkpoint in fp8"


def make_runner(
    setup: EngineSetup, num_pages: int, *, wait: Callable[[torch.cuda.Event], None] | None = None
) -> ModelRunner:
    """Make the runner, with memory for `num_pages` pages on the model's device. Prepares the weights if necessary.

    Args:
        wait: see `GraphRunner`.

    Raises:
        ConfigError: the requested attention backend is unknown or does not run on this device, or the configuration
            asks for something it cannot do.
    """
    prepared = _prepare(setup, num_pages)
    if isinstance(prepared, EagerModel):
        return EagerRunner(prepared)
    from llm.serving.graph_runner import GraphRunner  # triton is installed only on GPU machines

    return GraphRunner(prepared, wait=wait)


def make_follower(setup: EngineSetup, num_pages: int) -> Follower:
    """Make what runs the steps of `make_runner`'s runner on another rank."""
    prepared = _prepare(setup, num_pages)
    if isinstance(prepared, EagerModel):
        return EagerFollower(prepared, setup.table_len)
    from llm.serving.graph_follower import GraphFollower

    return GraphFollower(prepared)


def _prepare(setup: EngineSetup, num_pages: int) -> "EagerModel | GraphModel":
    """Prepare the weights, allocate the pool's memory, and make what runs the model's part of steps."""
    model, config = setup.model, setup.config
    backend = choose_backend(config.attention_backend, model.device)
    prepare_weights(model, config)
    model.fit_context(setup.context_len)
    kv_cache = setup.make_kv_cache(num_pages)
    memory = None if setup.adapters is None else AdapterMemory(model, setup.adapters, config.max_adapters, model.dtype)
    if backend != TRITON:
        return EagerModel(
            model, kv_cache, make_backend(backend), max_rows=setup.max_rows, num_snapshots=setup.num_snapshots,
            adapters=memory,
        )  # fmt: skip
    from llm.serving.graph_model import GraphModel

    return GraphModel(
        model,
        kv_cache,
        max_rows=setup.max_rows,
        max_tokens=setup.max_tokens,
        table_len=setup.table_len,
        max_draws_per_row=1 + config.num_speculative_tokens,
        deterministic=config.deterministic,
        num_snapshots=setup.num_snapshots,
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
