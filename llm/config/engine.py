"""`EngineConfig`: how an engine runs a model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from llm.config.adapters import AdapterSettings

MAX_TOP_LOGPROBS = 20
"""The largest number of most likely tokens whose log probabilities a request may ask for."""

_SNAPSHOT_BYTES, _SNAPSHOT_BYTES_ON_CPU = 4 << 30, 256 << 20
"""Memory for snapshots of states if the configuration does not set their number; a few snapshots may take more."""


class EngineConfig(AdapterSettings):
    """How one engine runs a model: memory, batching, numerics."""

    max_batch_size: int | None = Field(default=None, ge=1, le=4096)
    """Maximum number of sequences that run at once (rows); None for 32 on a CPU and 256 on a GPU."""
    max_seq_len: int | None = Field(default=None, ge=1)
    """Longest sequence in tokens; None for the model's own context length."""
    max_tokens_per_step: int | None = Field(default=None, ge=1)
    """Token budget of one step, decodes and prefill chunks together. None for 256 on a CPU, where steps that fit its
    caches are fastest, and 8192 on a GPU, but at least `max_batch_size`."""
    max_prefill_tokens_beside_decodes: int | None = Field(default=None, ge=1)
    """About how many prefill tokens of each new sequence go into a step in which others decode, up to 2,048 tokens in
    total. This bounds the gap between tokens while prompts arrive. If there are twice as many new sequences as decoding
    ones, the new ones start at once. None for 192 on a GPU and no separate bound on a CPU."""
    page_size: int = Field(default=16, ge=1, le=256)
    """Slots in a page. A slot holds one token's keys and values in every layer."""
    num_pages: int | None = Field(default=None, ge=1)
    """Pages in the pool. None to size the pool by `gpu_memory_utilization` on a GPU and by `cpu_pool_bytes` on a
    CPU."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Fraction of the GPU's memory, or of the engine's share of it, for weights, activations and the pool together."""
    gpu_share: float | None = Field(default=None, gt=0, le=1)
    """Part of the GPU that this engine may fill where it shares the GPU with others, whose memory then does not count
    as its own; None for all of it. A served model's share is `replicas.num_gpus` if that is below 1."""
    cpu_pool_bytes: int = Field(default=1 << 30, gt=0)
    """Maximum size of the pool on a CPU, in bytes. The pool never takes more than `max_batch_size` full sequences
    need."""
    enable_prefix_caching: bool = True
    """Keep full pages of finished sequences and share them with prompts that begin the same way."""
    num_state_snapshots: int | None = Field(default=None, ge=0)
    """Number of state snapshots that the prefix cache keeps, in a model whose layers have states (Qwen3.5). A prefix
    can be reused up to its last snapshot. None for twice the number of rows, limited to 4 GiB on a GPU and 256 MiB on a
    CPU. 0 for no prefix cache in such a model."""
    attention_backend: str | None = None
    """Name of an attention backend; None for the best one on this device."""
    quantization: Literal["fp8"] | None = None
    """GPU: "fp8" rounds the weights of the layers' projections to 8 bits (E4M3, one scale for each output) at start,
    which halves their memory and is faster. None for the checkpoint's own format, which may have 8 or 4 bits itself."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """GPU: "fp8" keeps keys and values in 8 bits (E4M3), which fits twice as many tokens in the same memory. It uses
    the checkpoint's scales if there are any. "auto" keeps them in the model's format."""
    deterministic: bool = False
    """GPU: the same request gets the same tokens, bit for bit, whatever else runs at the time. It costs some speed."""
    num_speculative_tokens: int = Field(default=0, ge=0, le=32)
    """Maximum number of tokens that a sequence guesses from its own text (prompt-lookup decoding) and checks in one
    step. The output stays the same and takes fewer steps where text repeats itself. 0 turns it off."""
    tensor_parallel_size: int = Field(default=1, ge=1, le=64)
    """Number of GPUs in one node that share the model, each with a part of every layer. Use it for models larger than
    one GPU, or for shorter steps. On a CPU, the number of processes."""
    expert_parallel: bool = False
    """With several GPUs per model: each GPU holds some of the experts whole, instead of a part of every expert."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.max_tokens_per_step is not None and self.max_tokens_per_step < (self.max_batch_size or 1):
            raise ValueError(
                f"max_tokens_per_step {self.max_tokens_per_step} is below max_batch_size {self.max_batch_size}: "
                "every running sequence needs one token a step"
            )
        return self

    def batch_size(self, device_type: str) -> int:
        """Number of rows on a device of this type ("cpu", "cuda")."""
        default = 32 if device_type == "cpu" else 256
        return self.max_batch_size or min(default, self.max_tokens_per_step or default)

    def num_snapshots(self, device_type: str, state_bytes: int) -> int:
        """Number of state snapshots on a device of this type, each of `state_bytes`; 0 for a model without states."""
        if not state_bytes or not self.enable_prefix_caching:
            return 0
        if self.num_state_snapshots is not None:
            return self.num_state_snapshots
        room = _SNAPSHOT_BYTES_ON_CPU if device_type == "cpu" else _SNAPSHOT_BYTES
        return min(2 * self.batch_size(device_type), max(room // state_bytes, 4))

    def token_budget(self, device_type: str) -> int:
        """Maximum number of tokens in one step on a device of this type ("cpu", "cuda")."""
        return self.max_tokens_per_step or max(256 if device_type == "cpu" else 8192, self.batch_size(device_type))

    def prefill_beside_decodes(self, device_type: str) -> int:
        """Prefill tokens of each new sequence in a step with decodes on a device of this type."""
        default = self.token_budget(device_type) if device_type == "cpu" else 192
        return self.max_prefill_tokens_beside_decodes or default
