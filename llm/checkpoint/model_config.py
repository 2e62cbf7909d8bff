"""What a checkpoint's config.json says of its model."""

from pathlib import Path

from pydantic import ValidationError

from llm.checkpoint.json_files import read_json
from llm.checkpoint.quantization_keys import read_quantization
from llm.config import ModelConfig, describe
from llm.errors import CheckpointError, ConfigError
from llm.models.config_keys import ReadKeys
from llm.models.registry import CLASSIFIERS, FAMILIES

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "window_size": "sliding_window",
    "tie_embeddings": "tie_word_embeddings",
}
"""Keys of config.json whose fields of `ModelConfig` have other names."""


def load_model_config(directory: str | Path) -> ModelConfig:
    """Shape of the checkpoint in `directory`, from its config.json, as transformers 4 or 5 wrote it.

    Raises:
        CheckpointError: the architecture is not one of `FAMILIES`.
        ConfigError: config.json is missing, or holds something that cannot be used or is not understood.
    """
    path = Path(directory) / "config.json"
    config = ReadKeys(read_json(path))
    try:
        name = _find_architecture(config, path)
        model = FAMILIES[name].read_config(config, name)
        model = model.model_copy(update={"quantization": read_quantization(config, path.parent)})
        config.refuse_unread(model, name)
    except KeyError as error:
        raise ConfigError(
            f"{path}: {error.args[0]!r} is missing, or null; download the checkpoint's config.json again"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error, _KEYS)}; correct it") from error
    except ArithmeticError as error:
        raise ConfigError(f"{path}: a number is too small or too large ({error}); correct it") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: a value has the wrong type ({error}); correct it") from error
    return model


def _find_architecture(config: ReadKeys, path: Path) -> str:
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if name in FAMILIES:
            return str(name)
    generators = [name for name in FAMILIES if name not in CLASSIFIERS]
    known = f"supported: {', '.join(generators)}, and classifiers: {', '.join(CLASSIFIERS)}"
    if not names:
        raise CheckpointError(f"{path}: 'architectures' is missing; add the class that the weights are of, {known}")
    without_head = f"{str(names[0]).removesuffix('Model')}ForCausalLM"
    hint = f"for vectors set 'architectures' to ['{without_head}'] and 'tie_word_embeddings' to true; "
    raise CheckpointError(
        f"{path}: architecture {', '.join(map(str, names))} is not supported; "
        f"{hint if str(names[0]).endswith('Model') and without_head in FAMILIES else ''}{known}"
    )
