"""What a Hugging Face directory says about its model: which architecture, what shape, how to sample.

To add an architecture of the family, add a line to `ARCHITECTURES`.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from llm.config import ModelConfig, RopeScaling, RopeScalingType, StrictModel, describe
from llm.errors import CheckpointError, ConfigError

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
_HUB_TIMEOUT_S = 5
"""For the Hub to answer at all; files have more."""
_HUB_FILES_LEFT_OUT = ("original/*", "onnx/*", "consolidated*.safetensors")


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one model class of transformers differs from plain Llama, where its config.json does not say so."""

    qk_norm: bool = False
    has_qkv_bias: bool = False
    """Query, key and value always have a bias."""
    reads_biases: bool = False
    """`attention_bias` (all four projections) and `mlp_bias` in config.json count."""
    reads_window: bool = False
    """`sliding_window` in config.json counts, for the layers that `layer_types` names, else for every one."""
    has_window_switch: bool = False
    """`use_sliding_window` turns the window on, for layers from `max_window_layers` on."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(reads_biases=True),
    "MistralForCausalLM": Architecture(reads_window=True),
    "Qwen2ForCausalLM": Architecture(has_qkv_bias=True, reads_window=True, has_window_switch=True),
    "Qwen3ForCausalLM": Architecture(qk_norm=True, reads_biases=True, reads_window=True, has_window_switch=True),
}


class GenerationDefaults(StrictModel):
    """What a checkpoint recommends for sampling, for requests that say nothing; None where it does not."""

    temperature: float | None = Field(default=None, ge=0)
    """0 where the checkpoint says `do_sample: false`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None


def resolve_model_path(model: str) -> Path:
    """Directory of a checkpoint: `model` itself, or a download of the Hub repository of that name (or its cache).

    Raises:
        CheckpointError: neither is there; one line with the fix.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json and the weights")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model}: no such directory; give a checkpoint's directory or a Hub id such as org/name")
    return _download(model)


def _download(model: str) -> Path:
    """The Hub's repository of this name, from the cache if the Hub does not answer within a few seconds."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files: dict[str, Any] = {"allow_patterns": list(_HUB_FILES), "ignore_patterns": list(_HUB_FILES_LEFT_OUT)}
    try:
        # snapshot_download by itself waits for the Hub without an end.
        revision = HfApi().model_info(model, timeout=_HUB_TIMEOUT_S).sha
        return Path(snapshot_download(model, revision=revision, **files))
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated on the Hub: accept its terms there, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is no directory here, and the Hub has no model of that name; a private one needs HF_TOKEN"
        ) from error
    except Exception as error:  # the Hub client's errors share no base with those of its transport
        with suppress(LocalEntryNotFoundError):
            return Path(snapshot_download(model, local_files_only=True, **files))
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{model} is no directory here, was not downloaded before, and cannot be had from the Hub now: check the "
            f"name and the network ({type(error).__name__}: {reason})"
        ) from error


def load_model_config(directory: str | Path) -> ModelConfig:
    """Shape of the checkpoint in `directory`, from its config.json, as transformers 4 or 5 wrote it.

    Raises:
        CheckpointError: the architecture is not one of `ARCHITECTURES`, or the weights are quantized.
        ConfigError: config.json is missing, or holds something that cannot be used.
    """
    path = Path(directory) / "config.json"
    config = read_json(path)
    architecture = _find_architecture(config, path)
    _refuse_unsupported(config, path)
    try:
        rope_theta, rope_scaling, max_seq_len = _rope(config)
        window_size, window_layers = _window(config, architecture)
        reads_biases = architecture.reads_biases
        attention_bias = bool(reads_biases and config.get("attention_bias"))
        return ModelConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            max_seq_len=max_seq_len,
            window_size=window_size,
            window_layers=window_layers,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qk_norm=architecture.qk_norm,
            attention_bias=architecture.has_qkv_bias or attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=bool(reads_biases and config.get("mlp_bias")),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise ConfigError(
            f"{path}: {error.args[0]!r} is missing; download the checkpoint's config.json again"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}; correct it") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error}); correct it") from error


def load_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """Sampling defaults of the checkpoint in `directory`: generation_config.json, and config.json for token ids.

    Raises:
        ConfigError: one of the files holds something that cannot be used. Missing ones are fine.
    """
    directory = Path(directory)
    path, config_path = directory / "generation_config.json", directory / "config.json"
    found = read_json(path) if path.exists() else {}
    config = read_json(config_path) if config_path.exists() else {}
    eos = found.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    bos = found.get("bos_token_id")
    top_k = found.get("top_k")
    try:
        return GenerationDefaults(
            temperature=0.0 if found.get("do_sample") is False else found.get("temperature"),
            top_p=found.get("top_p"),
            top_k=None if top_k in (0, -1) else top_k,
            repetition_penalty=found.get("repetition_penalty"),
            eos_token_ids=frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos]),
            bos_token_id=config.get("bos_token_id") if bos is None else bos,
        )
    except (ValidationError, TypeError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path}: {reason}; correct or remove it") from error


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Raises:
        ConfigError: it is missing, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; is {path.parent} a Hugging Face checkpoint?") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download it again")
    return content


def _find_architecture(config: dict[str, Any], path: Path) -> Architecture:
    names = config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise CheckpointError(
        f"{path}: architecture {', '.join(map(str, names)) or 'not named'} is not supported; "
        f"supported: {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{path}: hidden_act {activation!r} is not supported; only silu is")
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: quantized weights are not supported; use the checkpoint in bfloat16 or float16")


def _rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None, int]:
    """RoPE base, scaling, and the context length that scaling gives, from either generation of config.json."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = found.get("rope_theta", config.get("rope_theta", 10000.0))
    trained_len: int = config["max_position_embeddings"]
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise TypeError("partial_rotary_factor other than 1 is not supported")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None, trained_len
    if kind not in set(RopeScalingType):
        supported = ", ".join(["default", *RopeScalingType])
        raise TypeError(f"rope type {str(kind)[:80]!r} is not supported; supported: {supported}")
    fields = {key: found[key] for key in RopeScaling.model_fields if found.get(key) is not None}
    fields |= {"rope_type": kind}
    fields.setdefault("original_max_position_embeddings", trained_len)
    scaling = RopeScaling(**fields)
    match scaling.rope_type:
        case RopeScalingType.LINEAR:
            return theta, scaling, int(trained_len * scaling.factor)
        case RopeScalingType.YARN:
            original_len = scaling.original_max_position_embeddings or trained_len
            return theta, scaling, max(trained_len, int(original_len * scaling.factor))
        case RopeScalingType.LLAMA3:
            return theta, scaling, trained_len


def _window(config: dict[str, Any], architecture: Architecture) -> tuple[int | None, tuple[int, ...] | None]:
    """Sliding window in tokens and the layers that have it (None for all)."""
    window_size = config.get("sliding_window")
    if not architecture.reads_window or window_size is None:
        return None, None
    if architecture.has_window_switch and not config.get("use_sliding_window", False):
        return None, None
    num_layers: int = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise TypeError(f"layer_types must hold {num_layers} of full_attention and sliding_attention")
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    elif architecture.has_window_switch:
        layers = tuple(range(min(config.get("max_window_layers", num_layers), num_layers), num_layers))
    else:
        return window_size, None
    if not layers:
        return None, None
    return window_size, None if len(layers) == num_layers else layers
