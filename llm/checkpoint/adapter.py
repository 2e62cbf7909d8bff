"""LoRA adapters as PEFT saves them, put on a model."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from llm.checkpoint.cut_slots import held_rows
from llm.checkpoint.json_files import read_json
from llm.checkpoint.weight_names import canonical_names
from llm.config import ModelConfig, describe
from llm.errors import CheckpointError, ConfigError
from llm.models.cuts import find_cut
from llm.models.decoder import DecoderModel
from llm.models.family import Destination
from llm.models.lora import LoRALinear, replace_module
from llm.models.quantized import QuantizedLinear
from llm.models.registry import destinations

Number = TypeVar("Number", int, float)

_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")
# Settings of PEFT that change what an adapter computes, and what each must be.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
    "velora_config",
)
_INITS_THAT_CHANGE_THE_MODEL = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module of a checkpoint, as its adapter's files have them.

    Attributes:
        a: A, (rank, in).
        b: B, (out, rank), in the model's order of outputs.
        place: the rows of the model's module that they add to.
        scaling: factor on `b @ a`.
    """

    a: torch.Tensor
    b: torch.Tensor
    place: Destination
    scaling: float


class AdapterReader:
    """Reads the files of adapters for one model.

    Args:
        model: of which only shapes are read. If it is a part of a model, the whole model's adapters are read.
    """

    def __init__(self, model: DecoderModel) -> None:
        self._places = adapted_places(model)
        is_whole = model.partition.size == 1
        whole = model if is_whole else DecoderModel.from_config(model.config, device="meta", dtype=model.dtype)
        self._modules = {place.module: whole.get_submodule(place.module) for place in self._places.values()}

    def read(self, adapter_dir: str | Path, *, max_rank: int | None = None, merges: bool = False) -> list[Factors]:
        """Read an adapter and check it against the model.

        Args:
            max_rank: largest rank that there is room for; None for any.
            merges: whether the factors are to become part of the weights, which those in codes cannot take in.

        Raises:
            ConfigError: adapter_config.json asks for something that is not supported.
            CheckpointError: the weights are missing, damaged, or do not fit the model.
        """
        directory = Path(adapter_dir)
        config = _Config.read(directory / "adapter_config.json")
        path = directory / "adapter_model.safetensors"
        found = _read_factors(path)
        names = canonical_names(found, self._places)
        factors = [self._fit(config, path, module, names[module], parts) for module, parts in found.items()]
        for each, module in zip(factors, found, strict=True):
            if max_rank is not None and len(each.a) > max_rank:
                raise ConfigError(
                    f"{path}: {module} has rank {len(each.a)}, and this engine has room for max_adapter_rank "
                    f"{max_rank}; raise it"
                )
            if merges and isinstance(self._modules[each.place.module], QuantizedLinear):
                raise ConfigError(
                    f"{path}: {module} is quantized (quantization_config), and an adapter cannot be merged into it; "
                    "merge it into the checkpoint in bfloat16 or float16, or let requests choose it (max_adapters)"
                )
        return factors

    def _fit(self, config: "_Config", path: Path, module: str, name: str, factors: dict[str, torch.Tensor]) -> Factors:
        """Check the factors of one module; `name` is the family's name for it."""
        place = self._places.get(name)
        if place is None:
            names = sorted({name.rpartition(".")[2] for name in self._places})
            raise CheckpointError(
                f"{path}: an adapter on {module} is not supported for this model; supported: {', '.join(names)}"
            )
        if factors.keys() != {"A", "B"}:
            raise CheckpointError(f"{path}: {module} has only one of lora_A and lora_B; save the adapter again")
        linear = self._modules[place.module]
        assert isinstance(linear, nn.Linear), "adapters fit linear layers"
        rank = config.rank_of(module)
        wanted = ((rank, linear.in_features), (len(range(*place.rows.indices(linear.out_features))), rank))
        found = (tuple(factors["A"].shape), tuple(factors["B"].shape))
        if found != wanted:
            raise CheckpointError(
                f"{path}: {module} has lora_A and lora_B of shapes {found[0]} and {found[1]}, the model asks for "
                f"{wanted[0]} and {wanted[1]}; was the adapter trained on this model?"
            )
        factor_b = factors["B"] if place.arrange is None else place.arrange(factors["B"])
        return Factors(factors["A"], factor_b, place, config.scaling_of(module))


def load_lora(model: DecoderModel, adapter_dir: str | Path) -> None:
    """Put a PEFT adapter on `model`; with several, their effects add up. The weights stay as they are.

    Raises:
        ConfigError: adapter_config.json asks for something that is not supported; nothing is changed.
        CheckpointError: the weights are missing, damaged, or do not fit the model; nothing is changed.
    """
    for factors in AdapterReader(model).read(adapter_dir, merges=True):
        place = factors.place
        layer = model.get_submodule(place.module)
        if not isinstance(layer, LoRALinear):
            assert isinstance(layer, nn.Linear), "adapters fit linear layers"
            layer = LoRALinear(layer)
            replace_module(model, place.module, layer)
        for part in held_parts(model, factors.place, len(factors.b)):
            layer.add(factors.a[:, part.inputs], factors.b[part.source], part.rows, factors.scaling)


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A part of an adapter that a process holds, with its part of the model.

    Attributes:
        inputs: columns of A.
        source: rows of B.
        rows: rows of the module that they add to, as far as this process holds it.
    """

    inputs: slice
    source: slice
    rows: slice


def held_parts(model: DecoderModel, place: Destination, num_rows: int) -> Iterator[HeldPart]:
    """The parts that a process holds of the factors for a place of `num_rows` rows: one, in a model that is whole."""
    cut = find_cut(model.config, model.partition, place.module)
    first = place.rows.start or 0
    inputs = slice(None) if cut.inputs is None else slice(cut.inputs.start, cut.inputs.stop)
    for source, rows in held_rows(range(first, first + num_rows), cut.outputs):
        yield HeldPart(inputs, source, rows)


def adapted_places(model: DecoderModel) -> dict[str, Destination]:
    """Destination of each module that an adapter may be on, by its name in checkpoints."""
    modules = dict(model.named_modules())
    return {
        name: place
        for name, place in destinations(model.config).items()
        if place.module.startswith("layers.") and isinstance(modules.get(place.module), nn.Linear)
    }


def check_lora(config: ModelConfig, adapter_dir: str | Path) -> None:
    """See that an adapter can be put on a model of this shape.

    Raises:
        CheckpointError, ConfigError: it cannot; see `load_lora`.
    """
    load_lora(DecoderModel.from_config(config, device="meta"), adapter_dir)


def check_adapter(config: ModelConfig, adapter_dir: str | Path, *, max_rank: int | None = None) -> None:
    """See that requests to an engine of this model can choose an adapter.

    Args:
        max_rank: the engine's `max_adapter_rank`; None for any.

    Raises:
        CheckpointError, ConfigError: they cannot; see `AdapterReader`.
    """
    AdapterReader(DecoderModel.from_config(config, device="meta")).read(adapter_dir, max_rank=max_rank)


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
Rank = Annotated[int, Field(gt=0)]


class _Config(BaseModel):
    """What adapter_config.json says about scaling."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: float
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, float] | None = None
    use_rslora: bool | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        config = read_json(path)
        _refuse_unsupported(config, path)
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe(error)}; correct it, or save the adapter again") from error

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def scaling_of(self, module: str) -> float:
        """`alpha / r`, or `alpha / √r` (rank-stabilized, Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, Number], module: str, default: Number) -> Number:
    """The value of the first pattern that the module's name ends with, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


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


def _read_factors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The factors A and B by module."""
    if not path.exists() and path.with_suffix(".bin").exists():
        raise CheckpointError(f"{path.with_suffix('.bin')} is a pickle and is not read; save it as safetensors")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                match = _TENSOR_NAME.fullmatch(name)
                if match is None:
                    raise CheckpointError(f"{path} holds {name}, which is not a LoRA factor of a linear layer")
                factors.setdefault(match["module"], {})[match["part"]] = file.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a PEFT adapter?") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); save the adapter again") from error
    if not factors:
        raise CheckpointError(f"{path} holds no LoRA factors; save the adapter again")
    return factors
