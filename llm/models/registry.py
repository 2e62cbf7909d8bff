"""What a Hugging Face directory says about its model: which architecture, what shape, how to sample.

To add an architecture of the family, add a line to `ARCHITECTURES`. A key of config.json that nobody here reads is
refused unless `llm.models.config_keys` knows it as harmless.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from llm.config import ModelConfig, StrictModel, describe
from llm.errors import CheckpointError, ConfigError
from llm.models.config_keys import ReadKeys, not_applied, shown
from llm.models.rope_keys import read_rope

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

_TAKEN_AS_IS = ("top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")
_APPLIED = frozenset({
    *_TAKEN_AS_IS, "do_sample", "temperature", "top_k", "stop_strings", "suppress_tokens", "eos_token_id",
    "bos_token_id",
})  # fmt: skip
"""Keys of generation_config.json that count."""


TokenId = Annotated[int, Field(ge=0)]


class GenerationDefaults(StrictModel):
    """What a checkpoint recommends for generation, for requests that say nothing; None where it does not."""

    model_config = ConfigDict(strict=True)

    temperature: float | None = Field(default=None, ge=0)
    """0 where the checkpoint says `do_sample: false`."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, ge=1)
    min_new_tokens: int | None = Field(default=None, ge=0)
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    suppress_tokens: tuple[TokenId, ...] = Field(default=(), max_length=512)
    """Ids that are never generated; few enough to leave room for a request's own biases."""
    eos_token_ids: frozenset[TokenId] = frozenset()
    bos_token_id: int | None = None
    warnings: tuple[str, ...] = ()
    """What the checkpoint recommends and this engine does not do, each in one line that names the file."""


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
        ConfigError: config.json is missing, or holds something that cannot be used or is not understood.
    """
    path = Path(directory) / "config.json"
    config = ReadKeys(read_json(path))
    name = _find_architecture(config, path)
    _refuse_quantized(config, path)
    try:
        model = _model_config(config, ARCHITECTURES[name], name)
        config.refuse_unread(model, name)
    except KeyError as error:
        raise ConfigError(
            f"{path}: {error.args[0]!r} is missing; download the checkpoint's config.json again"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}; correct it") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error}); correct it") from error
    return model


def _model_config(config: ReadKeys, architecture: Architecture, name: str) -> ModelConfig:
    """What the keys say; the caller turns what this raises into an error that names the file."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; only silu is")
    rope_theta, rope_scaling, max_seq_len = read_rope(config)
    window_size, window_layers = _window(config, architecture, name)
    has_bias = (architecture.reads_biases and config.get("attention_bias")) or False
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
        attention_bias=architecture.has_qkv_bias or has_bias,
        attention_output_bias=has_bias,
        mlp_bias=(architecture.reads_biases and config.get("mlp_bias")) or False,
        tie_embeddings=config.get("tie_word_embeddings") or False,
    )


def load_generation_defaults(directory: str | Path) -> GenerationDefaults:
    """What the checkpoint in `directory` recommends: generation_config.json, and config.json for token ids.

    Ids that the model cannot generate, because they are not in its vocabulary, are left out with a warning.

    Raises:
        ConfigError: one of the files holds something that cannot be used. Missing ones are fine.
    """
    directory = Path(directory)
    path, config_path = directory / "generation_config.json", directory / "config.json"
    found = read_json(path) if path.exists() else {}
    config = read_json(config_path) if config_path.exists() else {}
    ids = {key: config.get(key) if found.get(key) is None else found[key] for key in ("eos_token_id", "bos_token_id")}
    warnings = [f"{path}: {what} is not applied: the engine cannot do it" for what in not_applied(found, _APPLIED)]
    vocab_size = load_vocab_size(directory)
    known: dict[str, list[Any]] = {}
    for key, value in (("eos_token_id", ids["eos_token_id"]), ("suppress_tokens", found.get("suppress_tokens"))):
        known[key], unknown = _split_ids(value, vocab_size)
        if unknown:
            warnings.append(f"{path}: {key} {shown(unknown)} is left out: the model has {vocab_size} ids")
    top_k, stop = found.get("top_k"), found.get("stop_strings")
    try:
        return GenerationDefaults(
            **{key: found.get(key) for key in _TAKEN_AS_IS},
            temperature=0.0 if found.get("do_sample") is False else found.get("temperature"),
            top_k=None if top_k in (0, -1) else top_k,
            stop_strings=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            suppress_tokens=tuple(known["suppress_tokens"]),
            eos_token_ids=frozenset(known["eos_token_id"]),
            bos_token_id=ids["bos_token_id"],
            warnings=tuple(warnings),
        )
    except (ValidationError, TypeError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path}: {reason}; correct or remove it") from error


def load_vocab_size(directory: str | Path) -> int | None:
    """Ids of the model in `directory`, below which are all tokens that it can draw; None where nothing says so."""
    path = Path(directory) / "config.json"
    size = read_json(path).get("vocab_size") if path.exists() else None
    return size if isinstance(size, int) else None


def _split_ids(value: Any, vocab_size: int | None) -> tuple[list[Any], list[Any]]:
    """Ids that a model can draw, and those that it cannot; what is no id counts as one, to be refused later."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    unknown = [i for i in ids if isinstance(i, int) and not 0 <= i < (vocab_size or i + 1)]
    return [i for i in ids if i not in unknown], unknown


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


def _find_architecture(config: ReadKeys, path: Path) -> str:
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise CheckpointError(
        f"{path}: architecture {', '.join(map(str, names)) or 'not named'} is not supported; "
        f"supported: {', '.join(ARCHITECTURES)}"
    )


def _refuse_quantized(config: ReadKeys, path: Path) -> None:
    if config.get("quantization_config") or config.get("compression_config"):
        raise CheckpointError(f"{path}: quantized weights are not supported; use the checkpoint in bfloat16 or float16")


def _window(config: ReadKeys, architecture: Architecture, name: str) -> tuple[int | None, tuple[int, ...] | None]:
    """Sliding window in tokens and the layers that have it (None for all)."""
    window_size, is_on = config.get("sliding_window"), config.get("use_sliding_window")
    if is_on is False or (is_on is None and architecture.has_window_switch):
        window_size = None
    num_layers: int = config["num_hidden_layers"]
    kinds = config.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise ConfigError(f"layer_types must hold {num_layers} of full_attention and sliding_attention; correct it")
        if "sliding_attention" in kinds and window_size is None:
            raise ConfigError("layer_types names sliding_attention, but there is no sliding_window; correct one")
    if window_size is None:
        return None, None
    if not architecture.reads_window:
        if window_size >= config["max_position_embeddings"]:
            return None, None
        raise ConfigError(
            f"'sliding_window' is {shown(window_size)}, which {name} does not have; remove it if the model was "
            "trained without it"
        )
    if kinds is not None:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    elif architecture.has_window_switch:
        layers = tuple(range(min(config.get("max_window_layers", num_layers), num_layers), num_layers))
    else:
        return window_size, None
    if not layers:
        return None, None
    return window_size, None if len(layers) == num_layers else layers
