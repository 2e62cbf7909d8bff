"""`StepArrays`: a step as arrays of integers. Pure, the same for every runner."""

from collections.abc import Iterable, Iterator, Sequence as SequenceOf
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from llm.models.adapters import NO_ADAPTER
from llm.scheduling.sequence import StepPart

Int32Array = npt.NDArray[np.int32]
UNSEEN = -1
"""Stands for a token that the host has not seen: the one drawn last at its row."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """What a step runs and draws, int32 each. Tokens of a part are adjacent, in order of position; so are draws.

    Attributes:
        token_ids: (tokens,), `UNSEEN` for one that only the device knows.
        positions: (tokens,), position of each in its sequence.
        token_rows: (tokens,), row of each token's sequence.
        part_rows: (parts,), row of each part's sequence.
        query_starts: (parts,), the first token of each.
        query_lens: (parts,), number of tokens that run.
        context_lens: (parts,), tokens of the sequence once they have run.
        draw_rows: (draws,), the row of each draw.
        draw_positions: (draws,), position of the token to be drawn.
        draw_tokens: (draws,), the token of the step after which it is drawn.
        pooled_tokens: (pooled,), tokens whose hidden states belong to vectors.
        scored_tokens: (scored,), tokens after which the prompt's next token gets its log probability.
        restored: (2 snapshots,), row and place of each snapshot of states from which a row begins.
        saved: (2 snapshots,), row and place of each snapshot that a row leaves behind.
        part_adapters: (parts,), slot of each part's adapter, `NO_ADAPTER` for none.
        page_places: (changes,), places that change in the page tables, (groups, rows, pages) flattened.
        pages: (changes,), the new pages at these places.
        plain_draws: (1,), 1 if none of the draws needs more than temperature, cuts and noise, otherwise 0.
    """

    token_ids: Int32Array
    positions: Int32Array
    token_rows: Int32Array
    part_rows: Int32Array
    query_starts: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    draw_rows: Int32Array
    draw_positions: Int32Array
    draw_tokens: Int32Array
    pooled_tokens: Int32Array
    scored_tokens: Int32Array
    restored: Int32Array
    saved: Int32Array
    part_adapters: Int32Array
    page_places: Int32Array
    pages: Int32Array
    plain_draws: Int32Array

    @classmethod
    def of(cls, parts: SequenceOf[StepPart], page_places: SequenceOf[int] = (), pages: SequenceOf[int] = ()) -> Self:
        """The arrays of a plan's parts, at least one, with their tokens as far as the host knows them.

        Args:
            page_places, pages: changes of the page tables, see `StepPacker`.
        """
        token_ids: list[int] = []
        for part in parts:
            tokens = part.sequence.tokens
            if part.num_tokens == 1:
                token_ids.append(tokens[part.start] if part.start < len(tokens) else UNSEEN)
            else:
                token_ids += part.token_ids
        fields = [
            (part.row, part.start, part.num_tokens, part.num_draws, part.num_pooled, part.first_scored, part.num_scored)
            for part in parts
        ]
        rows, starts, lens, num_draws, num_pooled, first_scored, num_scored = np.array(fields, dtype=np.int32).T
        ends, query_ends = starts + lens, lens.cumsum(dtype=np.int32)
        return cls(
            token_ids=np.array(token_ids, dtype=np.int32),
            positions=ranges(starts, lens),
            token_rows=rows.repeat(lens),
            part_rows=rows,
            query_starts=query_ends - lens,
            query_lens=lens,
            context_lens=ends,
            draw_rows=rows.repeat(num_draws),
            draw_positions=ranges(ends - num_draws + 1, num_draws),
            draw_tokens=ranges(query_ends - num_draws, num_draws),
            pooled_tokens=ranges(query_ends - num_pooled, num_pooled),
            scored_tokens=ranges(query_ends - ends + first_scored, num_scored),
            restored=_pairs((part.row, part.restored) for part in parts if part.restored is not None),
            saved=_pairs((part.row, part.saved) for part in parts if part.saved is not None),
            part_adapters=np.array(
                [NO_ADAPTER if (slot := part.sequence.adapter_slot) is None else slot for part in parts], dtype=np.int32
            ),
            page_places=np.array(page_places, dtype=np.int32),
            pages=np.array(pages, dtype=np.int32),
            plain_draws=np.array([all(part.sequence.draws_plainly for part in parts)], dtype=np.int32),
        )

    @classmethod
    def num_fields(cls) -> int:
        """How many arrays there are."""
        return len(fields(cls))

    def fields(self) -> list[Int32Array]:
        """The arrays in the order listed above."""
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def has_prefills(self) -> bool:
        """Whether any part has more than one token."""
        return len(self.token_ids) > len(self.part_rows)

    @property
    def has_adapters(self) -> bool:
        """Whether any part has an adapter."""
        return bool((self.part_adapters != NO_ADAPTER).any())

    @property
    def draws_plainly(self) -> bool:
        """Whether none of the draws needs more than temperature, cuts and noise."""
        return bool(self.plain_draws[0])

    @property
    def token_adapters(self) -> Int32Array:
        """(tokens,), the slot of each token's adapter."""
        return self.part_adapters.repeat(self.query_lens)

    @property
    def kept_tokens(self) -> Int32Array:
        """Tokens whose hidden states are needed: those that draw, are pooled or are scored, in this order."""
        return np.concatenate([self.draw_tokens, self.pooled_tokens, self.scored_tokens])

    def most_pages(self, page_size: int) -> int:
        """Pages of the longest context, once the step has run."""
        return int((-(-self.context_lens // page_size)).max())


def _pairs(pairs: Iterable[tuple[int, int]]) -> Int32Array:
    """Pairs of numbers, flattened."""
    return np.array([number for pair in pairs for number in pair], dtype=np.int32)


def batches(length: int, at_once: int) -> Iterator[slice]:
    """Split `length` places into slices of at most `at_once`.

    All ranks of a model must split what they score in the same way, because they gather the logits slice by slice.
    """
    for first in range(0, length, at_once):
        yield slice(first, min(first + at_once, length))


def ranges(starts: Int32Array, lens: Int32Array) -> Int32Array:
    """`lens[0]` numbers starting at `starts[0]`, then `lens[1]` starting at `starts[1]`, and so on."""
    ends = lens.cumsum(dtype=np.int32)
    numbers: Int32Array = np.arange(ends[-1], dtype=np.int32) + (starts - ends + lens).repeat(lens)
    return numbers
