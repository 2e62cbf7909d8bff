"""LoRA adapters as PEFT saves them, put on a model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llm.checkpoint.cut_slots import held_rows
from llm.checkpoint.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, refuse_pickle
from llm.checkpoint.weight_names import canonical_names
from llm.config import ModelConfig
from llm.errors import CheckpointError, ConfigError
from llm.models.cuts import find_cut
from llm.models.decoder import DecoderModel
from llm.models.family import Destination
from llm.models.lora import LoRALinear, replace_module
from llm.models.quantized import QuantizedLinear
from llm.models.registry import destinations

_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


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
        config = PeftConfig.read(directory / CONFIG_FILE)
        path = directory / WEIGHTS_FILE
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

    def _fit(self, config: PeftConfig, path: Path, module: str, name: str, factors: dict[str, torch.Tensor]) -> Factors:
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


def _read_factors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The factors A and B by module."""
    refuse_pickle(path)
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
