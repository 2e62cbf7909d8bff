"""What an engine refuses before it begins."""

import logging
from collections.abc import Collection, Sequence

from llm.config import EngineConfig, ModelConfig
from llm.core.row_tensors import MAX_ENTRIES
from llm.errors import ConfigError, InvalidRequestError
from llm.scheduling.scheduler import Scheduler
from llm.schemas import GenerationRequest, Pooling

logger = logging.getLogger(__name__)

_ID_FIELDS = ("output_token_ids", "stop_token_ids", "logit_bias", "allowed_token_ids")
"""Fields of a request, besides its prompt, that hold token ids: an id past the vocabulary would fail a whole step."""


def check_request(
    request: GenerationRequest,
    prompt_ids: Sequence[int],
    end_ids: Collection[int],
    *,
    vocab_size: int,
    max_seq_len: int,
    has_tokenizer: bool,
) -> None:
    """Refuse a request that can never be served.

    Args:
        prompt_ids: the prompt's tokens.
        end_ids: token ids that end the output.
        vocab_size: of the model.
        max_seq_len: tokens that a sequence may have, prompt and output together.
        has_tokenizer: whether the engine can handle text.

    Raises:
        InvalidRequestError: the request can never be served; the message says why.
    """
    for field in _ID_FIELDS:
        _check_ids(getattr(request, field) or (), vocab_size, field)
    num_entries = len(request.logit_bias) + len(end_ids if request.min_new_tokens else ())
    if num_entries > MAX_ENTRIES:
        raise InvalidRequestError(
            f"logit_bias and the stop ids that min_new_tokens bans are {num_entries} ids together; "
            f"at most {MAX_ENTRIES} are possible",
            param="logit_bias",
        )
    if request.stop and not has_tokenizer:
        raise InvalidRequestError("stop strings need an engine with a tokenizer; use stop_token_ids", param="stop")
    check_prompt(prompt_ids, len(request.output_token_ids), vocab_size=vocab_size, max_seq_len=max_seq_len)


def check_task(request: GenerationRequest, model: ModelConfig) -> None:
    """Refuse a request for what the model has no head for.

    Raises:
        InvalidRequestError: a classifier can only give labels, and no other model can.
    """
    wants_labels = request.pooling is Pooling.LABELS
    if wants_labels and model.classifier is None:
        raise InvalidRequestError(f"{model.architecture} has no head for labels, so it cannot classify", param="model")
    if model.classifier is not None and not wants_labels:
        raise InvalidRequestError(
            f"{model.architecture} gives labels to texts; it can neither generate tokens nor embed", param="model"
        )


def without_padding(prompt_ids: tuple[int, ...], pad_token_id: int | None) -> tuple[int, ...]:
    """A classifier's prompt up to the last token that is no padding; of padding alone, the first token.

    What stands behind this token cannot change its hidden state.
    """
    end = len(prompt_ids)
    while end > 1 and prompt_ids[end - 1] == pad_token_id:
        end -= 1
    return prompt_ids[:end]


def check_prompt(prompt_ids: Sequence[int], num_output: int = 0, *, vocab_size: int, max_seq_len: int) -> None:
    """Refuse a prompt that leaves no room for another token.

    Args:
        num_output: tokens already generated after it.

    Raises:
        InvalidRequestError: the prompt is empty, too long, or holds ids past the vocabulary.
    """
    if not prompt_ids:
        raise InvalidRequestError("the prompt is empty; generation needs at least one token", param="prompt")
    _check_ids(prompt_ids, vocab_size, "prompt")
    num_tokens = len(prompt_ids) + num_output
    if num_tokens >= max_seq_len:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens; this engine's context is {max_seq_len} tokens, "
            "and at least one is generated",
            param="prompt",
            code="context_length_exceeded",
        )


def _check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    if ids and max(ids) >= vocab_size:
        raise InvalidRequestError(f"token id {max(ids)} is beyond the vocabulary of {vocab_size} ids", param=param)


def check_features(model: ModelConfig, config: EngineConfig) -> list[str]:
    """Features of a configuration that this model does without, one line each.

    Raises:
        ConfigError: the configuration asks for something this model cannot do.
    """
    if model.latent is not None and config.kv_cache_dtype == "fp8":
        raise ConfigError(
            f"kv_cache_dtype: fp8: {model.architecture} keeps one latent vector a token in place of keys and values, "
            "which is not rounded to 8 bits; leave it out"
        )
    if config.expert_parallel and (not model.num_experts or config.tensor_parallel_size == 1):
        lacking = "tensor_parallel_size above 1" if model.num_experts else f"experts, which {model.architecture} lacks"
        raise ConfigError(f"expert_parallel: true needs {lacking}; leave it out")
    if model.delta is None:
        return []
    if config.num_speculative_tokens:
        raise ConfigError(
            f"num_speculative_tokens: {config.num_speculative_tokens}: {model.architecture} has layers that keep a "
            "state, which cannot take back a wrong guess; leave it out"
        )
    if config.enable_prefix_caching and config.num_state_snapshots == 0:
        return [
            f"{model.architecture} has layers that keep a state, of which num_state_snapshots: 0 keeps no snapshots: "
            "every prompt is computed from its first token, without a prefix cache"
        ]
    return []


def longest_context(model: ModelConfig, config: EngineConfig) -> int:
    """Longest sequence in tokens; never longer than the model's own context length.

    Raises:
        ConfigError: the configuration asks for a longer one.
    """
    if config.max_seq_len is not None and config.max_seq_len > model.max_seq_len:
        raise ConfigError(
            f"max_seq_len {config.max_seq_len} is past the model's context of {model.max_seq_len} tokens; lower it"
        )
    return config.max_seq_len or model.max_seq_len


def check_quantization(model: ModelConfig, config: EngineConfig) -> None:
    """Refuse a weight format that differs from the checkpoint's.

    Raises:
        ConfigError: the configuration asks for a different format.
    """
    formats = () if model.quantization is None else model.quantization.formats
    if config.quantization == "fp8" and any(each.num_bits == 4 for each in formats):
        raise ConfigError("quantization: fp8 is not what the checkpoint holds, which is 4 bits; leave it out")


def fit_context_to_pool(scheduler: Scheduler) -> None:
    """Reduce the context length to what the pool holds, if that is less: a sequence never outgrows the pool.

    Raises:
        ConfigError: the pool cannot hold even a window and a step.
    """
    most_tokens, pool = scheduler.most_tokens(scheduler.max_seq_len), scheduler.pool
    if most_tokens == scheduler.max_seq_len:
        return
    windows = [window for window in scheduler.windows if window is not None]
    if not most_tokens or (len(windows) == len(scheduler.windows) and scheduler.max_seq_len > min(windows)):
        raise ConfigError(
            f"a pool of {pool.num_pages} pages of {pool.page_size} slots is too small for a window of "
            f"{max(windows)} tokens and steps of {scheduler.max_tokens_per_step} in {len(scheduler.windows)} group(s) "
            "of layers; raise num_pages or lower max_tokens_per_step"
        )
    logger.warning(
        "the pool's %d slots hold less than one sequence of max_seq_len=%d; context reduced to %d tokens",
        pool.num_pages * pool.page_size, scheduler.max_seq_len, most_tokens,
    )  # fmt: skip
    scheduler.max_seq_len = most_tokens


def with_overrides(config: EngineConfig, max_batch_size: int | None, max_seq_len: int | None) -> EngineConfig:
    """Return the configuration with the engine's shorthand arguments applied, validated again."""
    overrides = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
    changed = {name: value for name, value in overrides.items() if value is not None}
    return EngineConfig(**{**config.model_dump(), **changed}) if changed else config
