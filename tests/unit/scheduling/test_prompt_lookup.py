"""What is proposed behind which tokens, and when nothing is."""

import random

import pytest

from llm.scheduling.prompt_lookup import PromptLookup


def propose(tokens: list[int], max_tokens: int = 4) -> tuple[int, ...]:
    return PromptLookup(list(tokens), max_tokens).propose()


def follow(text: list[int], num_prompt: int, max_tokens: int = 8) -> tuple[int, int, int]:
    """Let a sequence become `text`; returns (steps, proposed tokens, accepted tokens) as an engine counts them."""
    tokens = text[:num_prompt]
    lookup = PromptLookup(tokens, max_tokens)
    num_steps = num_proposed = num_accepted = 0
    while len(tokens) < len(text):
        proposal = lookup.propose()[: len(text) - len(tokens) - 1]
        come = text[len(tokens) : len(tokens) + len(proposal) + 1]
        num_right = next((i for i, (ours, real) in enumerate(zip(proposal, come, strict=False)) if ours != real), None)
        num_right = len(proposal) if num_right is None else num_right
        tokens += come[: num_right + 1]
        num_steps += 1
        num_proposed += len(proposal)
        num_accepted += num_right
    return num_steps, num_proposed, num_accepted


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], ()),
        ([1], ()),
        ([1, 2, 3, 4], ()),
        ([1, 2, 3, 4, 5, 6, 7, 8], ()),
        ([1, 2, 3, 9, 1, 2, 3], ()),
        ([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3, 4], (5, 6, 7, 9)),
        ([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 9, 8, 1, 2, 3, 4], (6, 9, 8, 1)),
        ([7, 1, 2, 3, 4, 5, 9, 8, 1, 2, 3, 4, 6, 9, 7, 1, 2, 3, 4], (5, 9, 8, 1)),
        ([1, 2, 3, 1, 2, 3, 1], (2, 3, 1, 2)),
        ([1, 2, 1, 2, 1, 2], (1, 2, 1, 2)),
        ([6, 6, 6, 6, 6], (6, 6, 6, 6)),
    ],
    ids=["empty", "one token", "one run", "no repeat", "too short", "run again", "latest", "longest match",
         "over the end", "period two", "period one"],
)  # fmt: skip
def test_what_is_proposed(tokens, expected):
    assert propose(tokens) == expected


def test_proposal_stays_until_tokens_come():
    """Asked twice it says the same; when the list has grown it speaks of the new end."""
    tokens = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]
    lookup = PromptLookup(tokens, 2)
    assert lookup.propose() == lookup.propose() == (5, 6)
    tokens.append(5)
    assert lookup.propose() == (6, 7)


def test_proposals_grow_while_right():
    tokens = [*range(100), *range(4)]
    lookup = PromptLookup(tokens, 16)
    lengths = []
    for _ in range(4):
        lengths.append(len(lookup.propose()))
        tokens += range(tokens[-1] + 1, tokens[-1] + 2 + lengths[-1])
    assert lengths == [4, 8, 16, 16]


def test_more_must_agree_while_wrong():
    """A run that always comes again and is always followed by something new is soon not enough."""
    text = [token for i in range(500) for token in (1, 2, 3, 4, 1000 + i)]
    _, num_proposed, num_accepted = follow(text, 5)
    assert num_proposed <= 4
    assert num_accepted == 0


def test_pauses_while_wrong():
    """The same with runs so long that no more can be asked: shorter proposals, then longer and longer pauses."""
    tokens: list[int] = []
    lookup = PromptLookup(tokens, 8)
    lengths = []
    for i in range(300):
        tokens += range(1, 13)
        lengths.append(len(lookup.propose()))
        tokens.append(1000 + i)
    assert lengths[:6] == [0, 4, 2, 1, 1, 1]
    assert sum(lengths[-100:]) in range(10, 30)


@pytest.mark.parametrize("vocab_size", [30, 1000])
def test_random_text_is_left_alone(vocab_size):
    """Pairs come again by chance, and mean nothing: hardly a token is run in vain."""
    rng = random.Random(1)
    num_steps, num_proposed, _ = follow([rng.randrange(vocab_size) for _ in range(4000)], 100)
    assert num_proposed < 0.05 * num_steps


def test_repeating_text_takes_few_steps():
    """A passage of 500 tokens once more, in steps of close to 9 tokens, though a random text stood between."""
    rng = random.Random(2)
    passage = [rng.randrange(1000) for _ in range(500)]
    between = [rng.randrange(1000) for _ in range(500)]
    num_steps, _, num_accepted = follow([*passage, *between, *passage], 1000)
    assert num_steps < 500 / 8 + 8
    assert num_accepted > 400


def test_a_period_is_carried_on():
    """A pattern shorter than a proposal goes on for as long as it does."""
    num_steps, *_ = follow([4, 5, 6] * 200, 5)
    assert num_steps < 600 / 9 + 5


@pytest.mark.parametrize("max_tokens", [1, 3, 32])
def test_no_proposal_is_longer_than_asked(max_tokens):
    tokens = [1, 2, 1, 2, 1, 2]
    lookup = PromptLookup(tokens, max_tokens)
    for _ in range(100):
        assert len(lookup.propose()) <= max_tokens
        tokens += [1, 2]
