"""Settings of one model that is served: what its engines load, how many there are, and how its text is read."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from deployments.adapters_config import (
    MAX_NAME_CHARS,
    AdapterEntry,
    check_client_name,
    check_entries,
    check_roots,
)
from deployments.vectors_config import EmbeddingsConfig, ScoringConfig
from llm.checkpoint.hub import is_gguf
from llm.config import EngineConfig, StrictModel
from llm.errors import ConfigError

_PACKAGE = Path(__file__).parent
ClientName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(check_client_name)]
"""A name that clients use for a model."""


class EngineKind(StrEnum):
    """The kind of engine that an `EngineReplica` runs."""

    TORCH = "torch"
    """The model, on this replica's device."""
    EMULATED = "emulated"
    """No model: it makes tokens at a set pace, to measure or test everything around an engine."""


class DType(StrEnum):
    """Number format of weights, activations and KV cache."""

    AUTO = "auto"
    """bfloat16 on a GPU, float32 on a CPU."""
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class ToolParserName(StrEnum):
    """How the model writes tool calls."""

    AUTO = "auto"
    """As its chat template shows."""
    HERMES = "hermes"
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: Hermes, Qwen2.5, Qwen3, Granite 4."""
    QWEN3_CODER = "qwen3_coder"
    """`<tool_call><function=…><parameter=…>…`: Qwen3-Coder, Qwen3.5."""
    LLAMA3 = "llama3"
    """`{"name": …, "parameters": {…}}`: Llama 3."""
    PYTHONIC = "pythonic"
    """`[name(key="value")]`: Llama 3.2, Llama 4."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS]…`: Mistral."""
    DEEPSEEK = "deepseek"
    """`<｜tool▁calls▁begin｜>…`: DeepSeek V3, V3.1 and R1."""
    GLM = "glm"
    """`<tool_call>name<arg_key>…`: GLM-4.5 to 4.7."""
    KIMI = "kimi"
    """`<|tool_calls_section_begin|>…`: Kimi K2."""
    GRANITE = "granite"
    """`<|tool_call|>[…]`: Granite 3."""
    HARMONY = "harmony"
    """`<|channel|>commentary to=functions.name…`: gpt-oss."""
    NONE = "none"
    """Not at all."""


class ReasoningParserName(StrEnum):
    """How the model marks what it thinks before it answers."""

    AUTO = "auto"
    """As its chat template shows."""
    THINK = "think"
    """`<think>…</think>`: Qwen3, DeepSeek, GLM, Kimi and others."""
    MISTRAL = "mistral"
    """`[THINK]…[/THINK]`: Magistral, Ministral."""
    HARMONY = "harmony"
    """`<|channel|>analysis…`: gpt-oss."""
    NONE = "none"
    """Not at all."""


class EmulatedFault(StrEnum):
    """How an emulated engine breaks."""

    FAIL = "fail"
    """Every step fails, as with a GPU that has lost its context."""
    BREAK = "break"
    """The engine raises out of its step and never steps again."""
    HANG = "hang"
    """A step does not return."""
    KILL = "kill"
    """The process ends at once, as after a segmentation fault."""


class EmulationConfig(StrictModel):
    """Pace of the emulated engine, and ways to break it."""

    tokens_per_s: float = Field(default=100.0, gt=0)
    """Output tokens per second of each running stream."""
    prefill_tokens_per_s: float = Field(default=100_000.0, gt=0)
    """Prompt tokens per second, of all streams together."""
    max_seq_len: int = Field(default=8192, ge=2)
    """Context length in tokens."""
    start_s: float = Field(default=0.0, ge=0)
    """How long a replica takes to start, as loading a model does."""
    adapter_load_s: float = Field(default=0.05, ge=0)
    """How long it takes to load an adapter. It holds up to `engine.max_adapters` of them."""
    fault_dir: str | None = None
    """Directory for breaking single engines: while it holds a file named after an engine's process id, each step of
    that engine does what the file says (`fail`, `break`, `hang` or `kill`). Steps of a real engine meet a device-side
    assert instead."""
    poison_token_id: int | None = Field(default=None, ge=0)
    """A prompt that contains this token breaks every engine that runs it; None for no such token."""
    poison: EmulatedFault = EmulatedFault.HANG
    """What a prompt with this token does to the engine."""
    poison_after: int = Field(default=0, ge=0)
    """Output tokens that the engine makes before it breaks."""


class AutoscalingConfig(StrictModel):
    """When to add or remove replicas. They are added at once and removed after a while."""

    min_replicas: int = Field(default=1, ge=0)
    """0 to remove the last replica after `downscale_to_zero_delay_s` without a request; the next request waits for a
    start."""
    max_replicas: int = Field(ge=1)
    initial_replicas: int | None = Field(default=None, ge=0)
    """None for `min_replicas`."""
    target_waiting_tokens: float = Field(default=16_384, gt=0)
    """Tokens per replica that may wait for prefill before another replica is added."""
    target_row_use: float = Field(default=0.8, gt=0)
    """Share of each replica's rows (`engine.max_batch_size`) that may be in use."""
    target_pool_use: float = Field(default=0.9, gt=0, le=1)
    """Share of each replica's slot pool that may be in use."""
    upscale_delay_s: float = Field(default=0.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    downscale_to_zero_delay_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas < max(self.min_replicas, self.initial_replicas or 0):
            raise ValueError("max_replicas must be at least min_replicas and initial_replicas")
        return self


class ReplicasConfig(StrictModel):
    """How many engine replicas there are and what each one gets."""

    num_replicas: int = Field(default=1, ge=1)
    """Fixed number of replicas; it has no effect if `autoscaling` is set."""
    autoscaling: AutoscalingConfig | None = None
    """Run as many replicas as the load needs."""
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs that Ray sets aside for each replica, which waits until a node has that many free. None for
    `engine.tensor_parallel_size` of them if `device` is `cuda`, or if a node of the cluster has a GPU or may join with
    one (on Kubernetes, or with Ray's cluster launcher); otherwise for zero, so that replicas run on CPUs. Set it where
    GPU nodes come and go. Replicas with less than 1 share a GPU; each fills no more than its part of the memory."""
    num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray sets aside for each replica. It only decides what fits on a node; see `torch_threads`."""
    torch_threads: int | None = Field(default=None, ge=1)
    """Threads of each replica's CPU kernels; None for an even share of the node's cores among the replicas."""
    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests that one replica runs or queues at once."""
    graceful_shutdown_timeout_s: float = Field(default=600.0, ge=0)
    """How long a replica that is being removed may take to finish its streams."""
    stall_timeout_s: float = Field(default=20.0, gt=0)
    """A step that takes longer fails the replica's health check; Serve then replaces the replica."""
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas that a rolling update may start before it removes old ones, in percent. The default is 0 because there
    is rarely a GPU to spare, and streams of a replica that is removed continue on the others."""

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.num_gpus is not None and self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus: {self.num_gpus:g} is neither a whole number nor below 1")
        return self

    @property
    def most_replicas(self) -> int:
        """Largest number of replicas allowed."""
        return self.autoscaling.max_replicas if self.autoscaling is not None else self.num_replicas

    @property
    def fewest_replicas(self) -> int:
        """Smallest number of replicas allowed."""
        return self.autoscaling.min_replicas if self.autoscaling is not None else self.num_replicas


class AdmissionConfig(StrictModel):
    """How much work may wait in a router, counted in tokens of prompts and expected answers."""

    max_queue_tokens: int = Field(default=4_000_000, ge=1)
    """Beyond this, requests are refused with 429."""
    max_queue_s: float = Field(default=30.0, gt=0)
    """Requests that would wait longer than this for a replica, at the pace measured last, are refused with 429."""
    max_backlog_steps: float = Field(default=4.0, gt=0)
    """How many engine steps' worth of prompts a router sends to a replica ahead of time. Further requests wait in the
    router, which can still send them elsewhere."""
    no_replica_timeout_s: float = Field(default=60.0, gt=0)
    """How long requests wait while no replica runs and none is being started; then the answer is 503. While a replica
    is starting, they wait without a limit, unless the start before it failed. The answer then says why, and it comes
    at once where several starts in a row have failed."""


class ServedModelConfig(StrictModel):
    """One model: an entry of `models`, or the application's own settings if it serves only one."""

    model: str = Field(default="configs/demo", min_length=1)
    """Directory of a Hugging Face checkpoint, a GGUF file, or a Hub id. A relative path counts from the working
    directory, or from this repository if it does not exist there."""
    served_model_name: ClientName | None = None
    """The name clients use; None for the directory's name, the file's without its suffix, or the Hub id."""
    aliases: tuple[ClientName, ...] = ()
    """More names that clients may use for the model."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Its share of the requests, relative to the other entries of `models` with the same name."""
    variant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Tells the entry from others of the same name, in metrics and among Serve's deployments. Without it, the second
    entry of a name is called `2`, and so on; with it, the entry keeps its replicas when the others are removed."""
    lora: str | None = None
    """Directory of a PEFT adapter that is merged into the weights."""
    adapters: tuple[AdapterEntry, ...] = ()
    """Adapters that requests may choose by name as their `model`. They need room in `engine.max_adapters`, and their
    directories, unless they are Hub ids, must be in the same place on the nodes of routers and replicas."""
    adapter_folder: str | None = Field(default=None, min_length=1)
    """A directory that is watched: each subdirectory that holds an `adapter_config.json` is an adapter of that name.
    New, changed and removed ones take effect within seconds."""
    adapter_roots: Annotated[tuple[str, ...], AfterValidator(check_roots)] = ()
    """Directories whose adapters administrators may load with `/v1/load_lora_adapter`, at any depth; none by
    default."""
    max_known_adapters: int = Field(default=1_000, ge=1, le=100_000)
    """Most adapters that requests may choose, from all of these sources together."""
    chat_template: str | None = Field(default=None, min_length=1)
    """File with a chat template in Jinja, used in place of the checkpoint's; or the template itself. It also says how
    tools are described to the model."""
    dtype: DType = DType.AUTO
    device: str | None = None
    """Torch device of the replicas; None for the GPU if a replica has one, otherwise the CPU."""
    engine_kind: EngineKind = EngineKind.TORCH
    engine: EngineConfig = EngineConfig()
    emulation: EmulationConfig = EmulationConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    admission: AdmissionConfig = AdmissionConfig()
    tool_parser: ToolParserName = ToolParserName.AUTO
    """What text becomes a `tool_call` in answers to requests with tools."""
    reasoning_parser: ReasoningParserName = ReasoningParserName.AUTO
    """What text becomes `reasoning_content` in answers to chats."""
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    scoring: ScoringConfig = ScoringConfig()

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        check_entries(self.adapters, self.max_known_adapters)
        if self.may_have_adapters and not self.engine.max_adapters:
            raise ValueError("adapters need room on the device: set engine.max_adapters to how many may run at once")
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        set_aside, needed = self.replicas.num_gpus, self.engine.tensor_parallel_size
        if needed > 1 and set_aside not in (None, 0) and set_aside != needed:
            raise ValueError(
                f"replicas.num_gpus: {set_aside:g} is not engine.tensor_parallel_size: {needed}; leave the first out"
            )
        return self

    @property
    def may_have_adapters(self) -> bool:
        """Whether there is any place that adapters may come from."""
        return bool(self.adapters or self.adapter_folder or self.adapter_roots)

    @property
    def model_name(self) -> str:
        """The name that clients use for the model."""
        if self.served_model_name is not None:
            return self.served_model_name
        path = Path(self.model).expanduser()
        if path.is_dir():
            return path.resolve().name
        return path.name.removesuffix(".gguf") if is_gguf(path) else self.model

    @property
    def gpu_share(self) -> float:
        """Part of a GPU that each replica may fill: 1 unless it shares the GPU with others."""
        if self.engine.gpu_share is not None:
            return self.engine.gpu_share
        set_aside = self.replicas.num_gpus
        return set_aside if set_aside is not None and 0 < set_aside < 1 else 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that clients may use for the model, `model_name` first."""
        return tuple(dict.fromkeys((self.model_name, *self.aliases)))


_OF_ROUTERS = (
    "aliases", "weight", "variant", "admission", "tool_parser", "reasoning_parser", "embeddings", "scoring",
    "adapters", "adapter_folder", "adapter_roots", "max_known_adapters",
)  # fmt: skip
"""Settings of a model that its engines have no use for."""
_OF_SERVE = {
    "num_replicas", "autoscaling", "num_gpus", "num_cpus", "max_ongoing_requests", "graceful_shutdown_timeout_s",
    "max_surge_percent",
}  # fmt: skip
"""Settings of replicas that Ray Serve applies to those that run."""


def for_engines(config: ServedModelConfig) -> ServedModelConfig:
    """The settings as engine replicas get them: those for routers are at their defaults."""
    fields = ServedModelConfig.model_fields
    return config.model_copy(update={name: fields[name].default for name in _OF_ROUTERS})


def restart_key(config: ServedModelConfig) -> str:
    """All settings for which a model's replicas have to be started anew."""
    return for_engines(config).model_dump_json(exclude={"replicas": _OF_SERVE})


def resolve_model(config: ServedModelConfig) -> ServedModelConfig:
    """The same settings with relative paths made absolute, so that every worker reads the same files.

    A path that does not exist here is not changed: it may be a Hub id, or a path on the replicas' nodes. A chat
        template is read here, for nodes that do not have the file.

    Raises:
        ConfigError: the chat template's file cannot be read.
    """
    changes: dict[str, Any] = {}
    for name in ("model", "lora"):
        place = _find_place(getattr(config, name))
        if place is not None:
            changes[name] = str(place)
    changes["chat_template"] = read_chat_template(config)
    changes["scoring"] = config.scoring.with_template_read()
    changes["adapters"] = tuple(map(_resolve_adapter, config.adapters))
    if config.adapter_folder is not None:
        changes["adapter_folder"] = str(Path(config.adapter_folder).expanduser().absolute())
    resolved = config.model_copy(update=changes)
    return resolved.model_copy(update={"served_model_name": resolved.model_name})


def _resolve_adapter(entry: AdapterEntry) -> AdapterEntry:
    path = Path(entry.path).expanduser()
    return entry.model_copy(update={"path": str(path.absolute())}) if path.is_dir() else entry


def read_chat_template(config: ServedModelConfig) -> str | None:
    """The text of the chat template that the configuration names; None where the checkpoint's is used.

    Raises:
        ConfigError: its file cannot be read.
    """
    given = config.chat_template
    if given is None or "{" in given:
        return given
    path = Path(given).expanduser()
    beside_code = _PACKAGE / path
    try:
        return (path if path.exists() else beside_code).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {error}; name a file with Jinja text") from None


def _find_place(value: str | None) -> Path | None:
    """An existing directory or GGUF file by this name, here or among the files that come with the package."""
    if value is None:
        return None
    path = Path(value).expanduser()
    for candidate in (path, _PACKAGE / path, _PACKAGE / "configs" / path):
        if candidate.is_dir():
            return candidate.resolve()
        if is_gguf(candidate):
            return candidate.absolute()  # the target of a link in the Hub's cache has another name
    return None
