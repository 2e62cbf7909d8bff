"""The settings of a PEFT adapter, `adapter_config.json`. This module needs no PyTorch, so routers check them too."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from llm.checkpoint.adapter_digest import ADAPTER_FILES
from llm.checkpoint.json_files import read_json
from llm.config import describe
from llm.errors import CheckpointError, ConfigError

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES
Number = TypeVar("Number", int, float)

# Settings of PEFT that change what an adapter computes, and what each must be.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "velora_config",
)
_INITS_THAT_CHANGE_THE_MODEL = ("pissa", "olora", "loftq", "corda")


def refuse_pickle(weights: Path) -> None:
    """Refuse an adapter whose weights are there only as a pickle, which is never read.

    Raises:
        CheckpointError: they are; the message has the fix.
    """
    if not weights.exists() and weights.with_suffix(".bin").exists():
        raise CheckpointError(f"{weights.with_suffix('.bin')} is a pickle and is not read; save it as safetensors")


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Rank = Annotated[int, Field(gt=0)]


class PeftConfig(BaseModel):
    """What adapter_config.json says about ranks and scaling."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: float
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, float] | None = None
    use_rslora: bool | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file, which may ask for nothing that is not supported.

        Raises:
            CheckpointError, ConfigError: it cannot be read, or asks for something else; one line with the fix.
        """
        config = read_json(path)
        _refuse_unsupported(config, path)
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe(error)}; correct it, or save the adapter again") from error

    @property
    def largest_rank(self) -> int:
        """The largest rank that a module may have."""
        return max(self.r, *(self.rank_pattern or {"": 0}).values())

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the adapter's file."""
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def scaling_of(self, module: str) -> float:
        """`alpha / r`, or `alpha / √r` (rank-stabilized, Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that the name of the module, or of its weight, ends with, as PEFT matches them."""
    names = module, f"{module}.weight"  # the second is what `target_parameters` target
    found = (value for key, value in patterns.items() for name in names if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type {kind!r} is not supported; only LORA is")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ConfigError(f"{path}: {key} is not supported; train the adapter without it or merge it with PEFT")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{path}: bias {config['bias']!r} is not supported; only 'none' is")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_MODEL):
        raise ConfigError(
            f"{path}: adapters initialized with {init!r} also change the model's weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
