"""What an engine asks of whatever runs its steps: `ModelRunner` on rank 0, `Follower` on the others."""

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from typing import NamedTuple, Protocol

import numpy as np
import torch

from llm.models.adapters import AdapterMemory
from llm.sampling.constraint import Int32Array, TokenMasks
from llm.sampling.draw import Draw
from llm.scheduling.sequence import Sequence, StepPart
from llm.schemas import TokenLogprobs
from llm.serving.step_arrays import StepArrays
from llm.serving.step_packer import PackedPlan

MAX_SCORED_AT_ONCE = 256
"""Most prompt tokens whose logits there is memory for at once."""


class PlannedDraw(NamedTuple):
    """A draw of a step: its part, and the position of the token to draw."""

    part: StepPart
    position: int


class LaunchedStep(Protocol):
    """A step that the device is running or has run."""

    def draws(self) -> list[Draw]:
        """Wait for the step; return the draws of the plan's parts in order, `num_draws` for each.

        Called at most once. Raises any error that occurred in the step.
        """
        ...

    def vectors(self) -> Mapping[int, bytes]:
        """The vectors that the step has completed, as in `StepOutput.vector`, by the rows of their parts.

        Called after `draws`.
        """
        ...

    def scores(self) -> SequenceOf[tuple[Sequence, list[TokenLogprobs]]]:
        """How likely the next tokens of prompts were: `num_scored` entries for each part that has any, in order.

        Called after `draws`.
        """
        ...


class ModelRunner(Protocol):
    """Owns the model, the pool's memory and everything else on the device, and runs steps in order of launching."""

    @property
    def attention_backend(self) -> str:
        """Name of the attention backend in use, for display."""
        ...

    @property
    def max_steps_ahead(self) -> int:
        """Steps that may be launched before the draws of the oldest one are read; 0 for none."""
        ...

    @property
    def max_draws_per_step(self) -> int | None:
        """Draws that a step has room for, at least one per row; None for any number."""
        ...

    @property
    def adapters(self) -> AdapterMemory | None:
        """Slots for adapters that requests choose; None if they cannot."""
        ...

    def run_largest(self, num_tokens: int) -> None:
        """Run the largest possible step, with `num_tokens` tokens of several sequences, and capture it if steps are
        captured: no step takes more memory."""
        ...

    def warm_up(self) -> None:
        """Prepare whatever would make a first request wait. Called before anything has been launched."""
        ...

    def launch(self, plan: PackedPlan) -> LaunchedStep:
        """Start a step.

        All of its data on the host (tokens, pages, requests) is read before this returns. A token that the host does
        not know yet (see `StepPart`) is the one drawn last at the part's row. If this raises, the step has no draws;
        steps launched before it are not affected.
        """
        ...


class Follower(Protocol):
    """What runs the steps of ranks 1 and up: their part of the model, like rank 0's runner, but it draws nothing.

    It joins every collective that rank 0's runner joins, in the same order: those of the layers, and the gathering of
    logits for draws and for log probabilities of prompts. On a GPU it also receives the tokens that rank 0 has drawn,
    because the next step may be launched before the host has read them.
    """

    @property
    def adapters(self) -> AdapterMemory | None:
        """Slots for this rank's part of the adapters that requests choose; None if they cannot."""
        ...

    def follow(self, arrays: StepArrays) -> None:
        """Run a step that rank 0 has launched."""
        ...

    def warm_up(self) -> None:
        """Warm up, as rank 0's runner does."""
        ...


def vector_bytes(found: torch.Tensor, rows: SequenceOf[int], *, normalizes: bool) -> dict[int, bytes]:
    """Convert sums of hidden states or logits of labels, (rows, size) float32 on the host, to `LaunchedStep.vectors`.

    Args:
        normalizes: make each vector's length 1.
    """
    vectors = found.numpy()
    if normalizes:
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return {row: vector.tobytes() for row, vector in zip(rows, vectors, strict=True)}


def planned_draws(parts: SequenceOf[StepPart]) -> list[PlannedDraw]:
    """A step's draws, in order."""
    return [PlannedDraw(part, part.end + 1 - i) for part in parts for i in range(part.num_draws, 0, -1)]


class DrawMasks(TokenMasks):
    """The tokens that draws constrained by a grammar may draw."""

    def write_draws(
        self, draws: SequenceOf[PlannedDraw], last_token_id: Callable[[int], int], masks: Int32Array
    ) -> None:
        """Write a row of bits for each of these draws.

        Args:
            draws: those that a grammar constrains.
            last_token_id: returns the token last drawn at a row; called if the host has not seen it yet.
            masks: (draws, num_words).
        """
        constraints = {}
        for index, (part, position) in enumerate(draws):
            sequence = part.sequence
            assert sequence.constraint is not None, "a grammar binds it"
            sequence.constraint.advance(sequence.tokens, sequence.num_prompt_tokens)
            if sequence.num_prompt_tokens + sequence.constraint.num_taken < position:
                sequence.constraint.take(last_token_id(part.row))
            constraints[index] = sequence.constraint
        self.write(constraints, masks)
