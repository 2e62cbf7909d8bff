"""Adapters on projections of all experts at once, as PEFT saves them for its `target_parameters`.

Where transformers keeps one projection of all experts of a layer in one parameter, PEFT wraps the module that has the
parameter, and again for each further one: factors are called `experts.lora_A.weight` or
`experts.base_layer.lora_A.weight`, and which parameter they are for follows from their shapes alone. A is (experts ·
rank, in), expert by expert; B is (out, rank · experts), whose columns have all experts of the first rank, then those of
the next.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from llm.checkpoint.adapter_places import Factors, expert_places
from llm.checkpoint.peft_config import PeftConfig
from llm.config import ModelConfig
from llm.errors import CheckpointError
from llm.models.family import Destination, ExpertStack
from llm.models.registry import destinations

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_WRAPPER = ".base_layer"


def unwrapped(module: str) -> str:
    """A module's name, in whatever number of PEFT's wrappers it is."""
    while module.endswith(_WRAPPER):
        module = module.removesuffix(_WRAPPER)
    return module


class StackReader:
    """Makes the factors of projections of experts from tensors of all of them.

    Args:
        config: of the model that adapters are for.

    Attributes:
        names: the model's experts by the names of the modules in checkpoints whose factors it reads.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._num_experts, self._hidden_size, self._size = config.num_experts, config.hidden_size, config.expert_size
        self.names: dict[str, Destination] = {}
        self._alternates = False
        for name, place in destinations(config).items():
            experts, _, leaf = place.module.rpartition(".")
            if leaf == _GATE_UP and (place.expert is not None or place.stack is not None):
                theirs = name.rsplit(".", 1 if place.expert is None else 2)[0]
                self.names[theirs] = Destination(experts)
                self._alternates |= place.stack is ExpertStack.ALTERNATING

    def reads_outputs(self, modules: Iterable[Mapping[str, torch.Tensor]]) -> bool:
        """Whether A reads what the experts' projections give, and B gives what they read, in an adapter's file.

        Versions of PEFT differ, and gpt-oss's parameters have their inputs first. Where a projection has as many inputs
        as outputs its shape does not tell, so the others of the file do.
        """
        shapes = [self._shape(factors) for factors in modules]
        return any(shape is not None and shape[::-1] in self._projections for shape in shapes) and not any(
            shape in self._projections for shape in shapes if shape is not None and shape[0] != shape[1]
        )

    def read(
        self, config: PeftConfig, path: Path, module: str, place: Destination, factors: Mapping[str, torch.Tensor], *,
        reads_outputs: bool,
    ) -> list[Factors]:  # fmt: skip
        """The factors of one parameter, as those of the projections that it is made of.

        Args:
            module: name in the file.
            place: that of `names` for it.
            reads_outputs: see the method of this name.

        Raises:
            CheckpointError: they do not fit the model.
        """
        shape = self._shape(factors)
        parameter = None
        if shape is not None:
            parameter = self._projections.get(shape[::-1] if reads_outputs else shape)
        rank = config.rank_of(f"{unwrapped(module)}.{parameter}")
        if parameter is None or len(factors["A"]) != rank * self._num_experts:
            found = ", ".join(f"lora_{part} {tuple(tensor.shape)}" for part, tensor in sorted(factors.items()))
            raise CheckpointError(
                f"{path}: {module} has {found}, but the model has {self._num_experts} experts of {self._hidden_size} "
                f"inputs and {self._size} numbers between their projections, and the adapter says rank {rank}; was the "
                "adapter trained on this model?"
            )
        factor_a, factor_b = self._unstacked(factors)
        if reads_outputs:
            factor_a, factor_b = factor_b.transpose(1, 2), factor_a.transpose(1, 2)
        scaling, experts = config.scaling_of(f"{unwrapped(module)}.{parameter}"), range(self._num_experts)
        gate, up, down = expert_places(place.module, self._size)
        if parameter == _DOWN:
            return [Factors(factor_a, factor_b, down, scaling, experts)]
        order = (slice(0, None, 2), slice(1, None, 2)) if self._alternates else (gate.rows, up.rows)
        return [
            Factors(factor_a, factor_b[:, rows], half, scaling, experts)
            for half, rows in zip((gate, up), order, strict=True)
        ]

    @property
    def _projections(self) -> dict[tuple[int, int], str]:
        """Parameters by their inputs and outputs."""
        return {(self._hidden_size, 2 * self._size): _GATE_UP, (self._size, self._hidden_size): _DOWN}

    def _shape(self, factors: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
        """What A reads and B gives; None where they are not of all experts."""
        if factors.keys() != {"A", "B"} or any(tensor.dim() != 2 for tensor in factors.values()):
            return None
        factor_a, factor_b = factors["A"], factors["B"]
        if len(factor_a) != factor_b.shape[1] or len(factor_a) % self._num_experts:
            return None
        return factor_a.shape[1], len(factor_b)

    def _unstacked(self, factors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (experts, rank, in), and B, (experts, out, rank)."""
        factor_a = torch.unflatten(factors["A"], 0, (self._num_experts, -1))
        return factor_a, torch.unflatten(factors["B"], 1, (-1, self._num_experts)).permute(2, 0, 1)
