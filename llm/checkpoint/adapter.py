"""LoRA adapters as PEFT saves them, put on a model."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llm.checkpoint.adapter_places import (
    Factors,
    adapted_places,
    held_factors,
    held_parts,
    of_one_expert,
    shape_of,
)
from llm.checkpoint.adapter_stacks import StackReader, unwrapped
from llm.checkpoint.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, refuse_pickle
from llm.checkpoint.weight_names import canonical_names
from llm.config import ModelConfig
from llm.errors import CheckpointError, ConfigError
from llm.models.decoder import DecoderModel
from llm.models.experts import ROUTING
from llm.models.lora import LoRALinear, add_to_weight, replace_module
from llm.models.quantized import Quantized
from llm.models.registry import FAMILIES

_TENSOR_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


class AdapterReader:
    """Reads the files of adapters for one model.

    Args:
        model: the model that adapters are for. Only its shapes are read. If it is a part of a model, adapters for the
            whole model are read.
        with_experts: whether adapters may be on routers and on what these choose among.
    """

    def __init__(self, model: DecoderModel, *, with_experts: bool = True) -> None:
        self._places = adapted_places(model)
        self._stacks = StackReader(model.config)
        self._renamed = FAMILIES[model.config.architecture].renamed
        self._with_experts = with_experts
        is_whole = model.partition.size == 1
        self._whole = model if is_whole else DecoderModel.from_config(model.config, device="meta", dtype=model.dtype)

    def read(self, adapter_dir: str | Path, *, max_rank: int | None = None, merges: bool = False) -> list[Factors]:
        """Read an adapter and check it against the model.

        Args:
            max_rank: largest rank that there is room for; None for any.
            merges: whether the factors are to become part of the weights, which those in codes cannot take in.

        Raises:
            ConfigError: adapter_config.json asks for something that is not supported, or the adapter for more than
                there is room for.
            CheckpointError: the weights are missing, damaged, or do not fit the model.
        """
        directory = Path(adapter_dir)
        config = PeftConfig.read(directory / CONFIG_FILE)
        path = directory / WEIGHTS_FILE
        found = _read_factors(path)
        names = canonical_names(map(unwrapped, found), self._places | self._stacks.names, self._renamed)
        named = {module: names[unwrapped(module)] for module in found}
        reads_outputs = self._stacks.reads_outputs(found[each] for each in found if named[each] in self._stacks.names)
        read = []
        for module, parts in found.items():
            if named[module] in self._stacks.names:
                theirs = self._stacks.names[named[module]]
                factors = self._stacks.read(config, path, module, theirs, parts, reads_outputs=reads_outputs)
            else:
                factors = [self._fit(config, path, module, named[module], parts)]
            for each in factors:
                self._check(each, path, module, max_rank=max_rank, merges=merges)
            read += factors
        return read

    def _check(self, factors: Factors, path: Path, module: str, *, max_rank: int | None, merges: bool) -> None:
        """Check that there is room for the factors of a module."""
        target = self._whole.get_submodule(factors.place.module)
        if isinstance(target, ROUTING) and not self._with_experts:
            raise ConfigError(
                f"{path}: {module} is a router, or an expert or a gate beside it, and this engine has no memory for "
                "adapters there; set adapter_experts: true, and see with `rayline check` how much an adapter takes then"
            )
        if max_rank is not None and factors.rank > max_rank:
            raise ConfigError(
                f"{path}: {module} has rank {factors.rank}, and this engine has room for max_adapter_rank {max_rank}; "
                "raise it"
            )
        if merges and isinstance(target, Quantized):
            raise ConfigError(
                f"{path}: {module} is quantized (quantization_config), and an adapter cannot be merged into it; "
                "merge it into the checkpoint in bfloat16 or float16, or let requests choose it (max_adapters)"
            )

    def _fit(
        self, config: PeftConfig, path: Path, module: str, name: str, factors: Mapping[str, torch.Tensor]
    ) -> Factors:
        """Check the factors of one module; `name` is the family's name for it."""
        place = self._places.get(name)
        if place is None:
            names = sorted({name.rpartition(".")[2] for name in self._places})
            raise CheckpointError(
                f"{path}: an adapter on {module} is not supported for this model; supported: {', '.join(names)}"
            )
        if factors.keys() != {"A", "B"}:
            raise CheckpointError(f"{path}: {module} has only one of lora_A and lora_B; save the adapter again")
        num_inputs, num_outputs = shape_of(self._whole.get_submodule(place.module))
        rank = config.rank_of(module)
        wanted = ((rank, num_inputs), (len(range(*place.rows.indices(num_outputs))), rank))
        found = (tuple(factors["A"].shape), tuple(factors["B"].shape))
        if found != wanted:
            raise CheckpointError(
                f"{path}: {module} has lora_A and lora_B of shapes {found[0]} and {found[1]}, the model asks for "
                f"{wanted[0]} and {wanted[1]}; was the adapter trained on this model?"
            )
        factor_b = factors["B"] if place.arrange is None else place.arrange(factors["B"])
        found_factors = Factors(factors["A"], factor_b, place, config.scaling_of(module))
        return found_factors if place.expert is None else of_one_expert(found_factors, place.expert)


@torch.no_grad()
def load_lora(model: DecoderModel, adapter_dir: str | Path) -> None:
    """Put a PEFT adapter on `model`; with several, their effects add up.

    Weights of linear layers stay as they are until `merge_lora`; those of experts and routers are added to at once.

    Raises:
        ConfigError: adapter_config.json asks for something that is not supported; nothing is changed.
        CheckpointError: the weights are missing, damaged, or do not fit the model; nothing is changed.
    """
    for factors in AdapterReader(model).read(adapter_dir, merges=True):
        for part in held_parts(model, factors.place, factors.b.shape[-2], factors.experts):
            factor_a, factor_b = held_factors(factors, part)
            layer = model.get_submodule(factors.place.module)
            if isinstance(layer, nn.Linear):
                if not isinstance(layer, LoRALinear):
                    layer = LoRALinear(layer)
                    replace_module(model, factors.place.module, layer)
                layer.add(factor_a, factor_b, part.rows, factors.scaling)
                continue
            weight = layer.get_parameter("weight")
            if part.experts is None:
                add_to_weight(weight[part.rows], factor_a, factor_b, factors.scaling)
                continue
            for expert, a, b in zip(weight[part.experts[1]], factor_a, factor_b, strict=True):
                add_to_weight(expert[part.rows], a, b, factors.scaling)


def check_lora(config: ModelConfig, adapter_dir: str | Path) -> None:
    """Check that an adapter can be put on a model of this shape.

    Raises:
        CheckpointError, ConfigError: it cannot; see `load_lora`.
    """
    load_lora(DecoderModel.from_config(config, device="meta"), adapter_dir)


def check_adapter(
    config: ModelConfig, adapter_dir: str | Path, *, max_rank: int | None = None, with_experts: bool = True
) -> None:
    """Check that requests to an engine of this model can choose an adapter.

    Args:
        max_rank: the engine's `max_adapter_rank`; None for any.
        with_experts: the engine's `adapter_experts`.

    Raises:
        CheckpointError, ConfigError: they cannot; see `AdapterReader`.
    """
    reader = AdapterReader(DecoderModel.from_config(config, device="meta"), with_experts=with_experts)
    reader.read(adapter_dir, max_rank=max_rank)


def _read_factors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The factors A and B by module."""
    refuse_pickle(path)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                match = _TENSOR_NAME.fullmatch(name)
                if match is None:
                    raise CheckpointError(
                        f"{path} holds {name}, which is not a LoRA factor of a layer's weight; train the adapter on "
                        "layers alone (and save it with save_embedding_layers=False), or merge it with PEFT"
                    )
                factors.setdefault(match["module"], {})[match["part"]] = file.get_tensor(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; is {path.parent} a PEFT adapter?") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); save the adapter again") from error
    if not factors:
        raise CheckpointError(f"{path} holds no LoRA factors; save the adapter again")
    return factors
