"""Sampling: the right distribution, the right cuts, and noise that depends on (seed, position) alone."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from llm.sampling.draw import Draw, SamplingRow, cut_unlikely, exponential_noise, sample

VOCAB = 64


def create_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def draw_many(logits: torch.Tensor, num_draws: int, **params) -> torch.Tensor:
    """Frequencies of `num_draws` draws from one row of logits, each with its own position."""
    rows = [SamplingRow(seed=3, position=position, **params) for position in range(num_draws)]
    token_ids = [draw.token_id for draw in sample(logits.expand(num_draws, -1), rows)]
    return torch.bincount(torch.tensor(token_ids), minlength=logits.shape[1]) / num_draws


def test_frequencies_follow_the_softmax():
    """20,000 draws land within four standard errors of softmax(logits / T) at every token."""
    logits, temperature, num_draws = create_logits(), 1.7, 20_000
    expected = (logits[0] / temperature).softmax(-1)
    observed = draw_many(logits, num_draws, temperature=temperature)
    tolerance = 4 * (expected * (1 - expected) / num_draws).sqrt() + 1e-3
    assert ((observed - expected).abs() < tolerance).all()


def test_noise_is_exponential_and_uncorrelated():
    """Mean 1, variance 1, and no correlation between neighbouring positions, seeds or tokens."""
    noise = exponential_noise([(seed, position) for seed in range(8) for position in range(8)], 20_000, "cpu")
    assert noise.min() > 0
    assert noise.mean().item() == pytest.approx(1, abs=0.005)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(64)).abs().max() < 0.04
    assert torch.corrcoef(torch.stack([noise[:, :-1].flatten(), noise[:, 1:].flatten()]))[0, 1].abs() < 0.005


def test_noise_is_a_pure_function_of_seed_and_position():
    """Alone or among others, the same draw has the same noise; a golden value pins it across versions and devices."""
    alone = exponential_noise([(7, 11)], 100, "cpu")
    among = exponential_noise([(1, 2), (7, 11), (7, 12)], 100, "cpu")
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[1], among[2])
    torch.testing.assert_close(alone[0, :3], torch.tensor(GOLDEN_NOISE), rtol=1e-6, atol=0)


GOLDEN_NOISE = [0.8788782954216003, 1.737317442893982, 0.7084219455718994]


def test_draws_do_not_depend_on_the_batch():
    """Rows of every kind mixed draw what each draws alone."""
    logits = create_logits(6)
    rows = [
        SamplingRow(1, 5, temperature=0),
        SamplingRow(2, 5, temperature=0.7, top_p=0.5),
        SamplingRow(3, 9, temperature=2.0, top_k=3),
        SamplingRow(-4, 5, min_p=0.2, presence_penalty=1.0, output_ids=[1, 1, 2]),
        SamplingRow(2**63 - 1, 5, logit_bias={3: 50.0}),
        SamplingRow(5, 1, num_logprobs=2),
    ]
    together = sample(logits, rows)
    for i, row in enumerate(rows):
        assert sample(logits[i : i + 1], [row])[0].token_id == together[i].token_id
    assert together[0].token_id == logits[0].argmax()
    assert together[4].token_id == 3


@given(top_k=st.integers(1, VOCAB), seed=st.integers(0, 1000))
def test_top_k_keeps_the_k_likeliest(top_k, seed):
    logits = create_logits(seed=seed)
    kept = cut_unlikely(logits, [SamplingRow(0, 0, top_k=top_k)])[0].isfinite()
    assert kept.sum() == top_k
    assert logits[0][kept].min() >= logits[0][~kept].max() if top_k < VOCAB else kept.all()


@given(top_p=st.floats(0.01, 0.999), seed=st.integers(0, 1000))
def test_top_p_keeps_the_smallest_sufficient_set(top_p, seed):
    """What is kept reaches top_p; without its least likely token it would not."""
    logits = create_logits(seed=seed)
    kept = cut_unlikely(logits, [SamplingRow(0, 0, top_p=top_p)])[0].isfinite()
    probabilities = logits[0].softmax(-1)
    mass = probabilities[kept].sum().item()
    assert mass >= top_p - 1e-5
    assert mass - probabilities[kept].min().item() < top_p + 1e-5


def test_min_p_is_relative_to_the_likeliest():
    logits = torch.tensor([[1.0, 0.5, 0.1, 0.05]]).log()
    kept = cut_unlikely(logits, [SamplingRow(0, 0, min_p=0.3)])[0].isfinite()
    assert kept.tolist() == [True, True, False, False]


def test_tie_at_the_cut_keeps_both():
    kept = cut_unlikely(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), [SamplingRow(0, 0, top_k=2)])[0].isfinite()
    assert kept.tolist() == [True, True, True, False]


def test_penalties_act_on_seen_tokens_only():
    """Presence once, frequency per count, repetition also on the prompt; each changes which token is greedy."""
    logits = torch.tensor([[3.0, 2.5, 2.0, -1.0]])

    def greedy(**params) -> int:
        return sample(logits, [SamplingRow(0, 0, temperature=0, **params)])[0].token_id

    assert greedy() == 0
    assert greedy(presence_penalty=0.6, output_ids=[0, 0, 0]) == 1
    assert greedy(frequency_penalty=0.2, output_ids=[0, 0, 0]) == 1
    assert greedy(frequency_penalty=0.2, output_ids=[0, 0]) == 0
    assert greedy(repetition_penalty=1.3, prompt_ids=[0]) == 1
    assert greedy(presence_penalty=0.6, prompt_ids=[0]) == 0
    assert greedy(banned_ids=[0, 1]) == 2
    assert greedy(logit_bias={3: 100.0}) == 3
    assert torch.equal(logits, torch.tensor([[3.0, 2.5, 2.0, -1.0]])), "the caller's logits are left alone"


def test_logprobs_are_of_the_model_before_temperature_and_cuts():
    logits = create_logits(2)
    rows = [SamplingRow(0, 0, temperature=0.3, top_k=1, num_logprobs=3), SamplingRow(0, 0, temperature=0)]
    asked, not_asked = sample(logits, rows)
    expected = logits[0].log_softmax(-1)
    assert asked.logprob == pytest.approx(expected[asked.token_id].item(), abs=1e-5)
    values, ids = expected.topk(3)
    assert [token_id for token_id, _ in asked.top] == ids.tolist()
    assert [value for _, value in asked.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert not_asked.logprob is None


def test_each_row_gets_the_log_probabilities_it_asked_for():
    """None, that of its token alone, or those of the likeliest too, whatever the other rows ask for."""
    rows = [SamplingRow(0, 0), SamplingRow(1, 0, num_logprobs=0), SamplingRow(2, 0, temperature=0, num_logprobs=2)]
    draws = sample(create_logits(3), rows)
    assert draws[0] == Draw(draws[0].token_id)
    assert [len(drawn.top) for drawn in draws] == [0, 0, 2]
    assert draws[1].logprob is not None
    assert draws[2].top[0] == (draws[2].token_id, draws[2].logprob)


def test_extreme_temperatures_are_finite():
    """A tiny temperature is greedy; a huge one is nearly uniform; neither yields NaN."""
    logits = create_logits()
    assert sample(logits, [SamplingRow(1, 1, temperature=1e-9)])[0].token_id == logits.argmax()
    observed = draw_many(logits, 5000, temperature=1e6)
    assert observed.max() < 3 / VOCAB
    assert not math.isnan(observed.sum())
