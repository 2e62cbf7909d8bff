"""A step as arrays, without a device: against loops that say the same token by token."""

import numpy as np
from hypothesis import given, strategies as st

from llm.scheduling.sequence import Sequence, StepPart, next_part
from llm.serving.schemas import GenerationRequest
from llm.serving.step_arrays import UNSEEN, StepArrays
from llm.serving.step_packer import StepPacker


def create_sequence(num_prompt: int, row: int, **params) -> Sequence:
    prompt = tuple(100 * row + i for i in range(num_prompt))
    sequence = Sequence(GenerationRequest(prompt_token_ids=prompt, max_new_tokens=9, **params), prompt, frozenset(), 16)
    sequence.row = row
    return sequence


def test_a_step_of_every_kind_of_part():
    """A decode, one whose token only the device knows, one with guesses, a chunk, a vector's chunk, a scored prompt."""
    decode, ahead, guessing = (create_sequence(4, row) for row in (5, 0, 7))
    for sequence in (decode, ahead, guessing):
        sequence.num_computed = 3
    ahead.num_computed, ahead.num_in_flight = 4, 1
    chunk, vector = create_sequence(9, 2), create_sequence(5, 3, pooling="mean")
    scored = create_sequence(4, 1, prompt_logprobs=0)
    chunk.num_computed = 2
    parts = [
        next_part(decode, 1), next_part(ahead, 1), next_part(guessing, 1).with_guesses((8, 9)), next_part(chunk, 3),
        next_part(vector, 5), next_part(scored, 4),
    ]  # fmt: skip
    arrays = StepArrays.of(parts)
    assert arrays.token_ids.tolist() == [
        503, UNSEEN, 703, 8, 9, 202, 203, 204, 300, 301, 302, 303, 304, 100, 101, 102, 103
    ]  # fmt: skip
    assert arrays.positions.tolist() == [3, 4, 3, 4, 5, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert arrays.token_rows.tolist() == [5, 0, 7, 7, 7, 2, 2, 2, 3, 3, 3, 3, 3, 1, 1, 1, 1]
    assert arrays.part_rows.tolist() == [5, 0, 7, 2, 3, 1]
    assert arrays.query_starts.tolist() == [0, 1, 2, 5, 8, 13]
    assert arrays.query_lens.tolist() == [1, 1, 3, 3, 5, 4]
    assert arrays.context_lens.tolist() == [4, 5, 6, 5, 5, 4]
    assert arrays.draw_rows.tolist() == [5, 0, 7, 7, 7, 1]
    assert arrays.draw_positions.tolist() == [4, 5, 4, 5, 6, 4]
    assert arrays.draw_tokens.tolist() == [0, 1, 2, 3, 4, 16]
    assert arrays.pooled_tokens.tolist() == [8, 9, 10, 11, 12]
    assert arrays.scored_tokens.tolist() == [13, 14, 15]
    assert arrays.kept_tokens.tolist() == [0, 1, 2, 3, 4, 16, 8, 9, 10, 11, 12, 13, 14, 15]
    assert arrays.has_prefills
    assert not StepArrays.of(parts[:2]).has_prefills


def naive(parts: list[StepPart]) -> dict[str, list[int]]:
    names = ("token_ids", "positions", "token_rows", "draw_rows", "draw_positions", "draw_tokens", "pooled_tokens",
             "scored_tokens")  # fmt: skip
    arrays: dict[str, list[int]] = {name: [] for name in names}
    for part in parts:
        for offset, token_id in enumerate(part.token_ids):
            index, position = len(arrays["token_ids"]), part.start + offset
            num_behind = part.num_tokens - 1 - offset
            arrays["token_ids"].append(token_id)
            arrays["positions"].append(position)
            arrays["token_rows"].append(part.row)
            if num_behind < part.num_draws:
                arrays["draw_rows"].append(part.row)
                arrays["draw_positions"].append(position + 1)
                arrays["draw_tokens"].append(index)
            if num_behind < part.num_pooled:
                arrays["pooled_tokens"].append(index)
            if part.first_scored <= position < part.first_scored + part.num_scored:
                arrays["scored_tokens"].append(index)
    return arrays


@given(st.data())
def test_any_step_is_what_loops_say(data: st.DataObject):
    parts = []
    for row in data.draw(st.permutations(range(data.draw(st.integers(1, 8))))):
        params = data.draw(st.sampled_from([{}, {"prompt_logprobs": 1}, {"pooling": "mean"}, {"pooling": "last"}]))
        sequence = create_sequence(data.draw(st.integers(1, 12)), row, **params)
        sequence.num_computed = data.draw(st.integers(0, sequence.num_prompt_tokens - 1))
        sequence.num_scored = data.draw(st.integers(0, sequence.num_prompt_tokens - 1))
        parts.append(next_part(sequence, data.draw(st.integers(1, sequence.num_uncomputed))))
        if parts[-1].draws_token and parts[-1].num_tokens == 1:
            parts[-1] = parts[-1].with_guesses(tuple(data.draw(st.lists(st.integers(0, 9), max_size=3))))
    arrays = StepArrays.of(parts)
    for name, expected in naive(parts).items():
        assert getattr(arrays, name).tolist() == expected, name


def test_page_tables_follow_from_changes():
    """Tables that get every step's changes have the rows' pages, whoever had the row before; each page is sent once."""
    packer, tables, num_starting = StepPacker(3, 4), np.full((2, 3, 4), -1), []
    first, second, third = (create_sequence(8, row) for row in (0, 2, 0))
    steps = [
        ([first], [[[1], [2]]], 2),
        ([first, second], [[[1], [2]], [[3, 5, 6], [4, 7, 8]]], 6),
        ([first, second], [[[1, 9], [2, 10]], [[3, 5, 6], [4, 7, 8]]], 2),
        ([third], [[[5], [6]]], 2),
    ]
    for sequences, pages, num_new in steps:
        for sequence, own in zip(sequences, pages, strict=True):
            sequence.pages = own
        packed = packer.pack([next_part(sequence, 1) for sequence in sequences])
        tables.reshape(-1)[packed.arrays.page_places] = packed.arrays.pages
        for sequence, own in zip(sequences, pages, strict=True):
            assert tables[:, sequence.row, : len(own[0])].tolist() == own
        assert len(packed.arrays.pages) == num_new
        num_starting.append(len(packed.starting))
    assert num_starting == [1, 1, 0, 1]
    third.num_preemptions += 1
    again = packer.pack([next_part(third, 1)])
    assert len(again.starting) == 1
    assert again.arrays.pages.tolist() == [5, 6]


def test_draws_are_plain_if_no_part_wants_more():
    plain, penalised = create_sequence(4, 0), create_sequence(4, 1, presence_penalty=0.5)
    assert StepArrays.of([next_part(plain, 4)]).draws_plainly
    assert not StepArrays.of([next_part(plain, 4), next_part(penalised, 4)]).draws_plainly
