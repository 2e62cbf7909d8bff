"""Sums of hidden states, in Triton's interpreter where there is no GPU."""

import pytest
import torch

from llm.kernels.pooling import add_states

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts_of(*parts: tuple[int, int, int, int]) -> torch.Tensor:
    """From (first token, row, number of tokens, whether the sum begins) a part."""
    return torch.tensor(parts, dtype=torch.int32, device=DEVICE).T.contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [32, 200])
def test_each_row_gets_its_own_states(dtype, hidden_size):
    """Sums that begin forget what was there, those that go on do not, and other rows stay as they are."""
    torch.manual_seed(0)
    hidden = torch.randn(40, hidden_size, device=DEVICE).to(dtype)
    before = torch.randn(6, hidden_size, device=DEVICE)
    sums = before.clone()
    add_states(hidden, parts_of((0, 4, 1, 1), (1, 0, 17, 1), (18, 5, 3, 0), (21, 2, 16, 0)), sums)
    wide = hidden.float()
    expected = before.clone()
    expected[4], expected[0] = wide[0], wide[1:18].sum(0)
    expected[5] += wide[18:21].sum(0)
    expected[2] += wide[21:37].sum(0)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


def test_chunks_change_no_bit():
    torch.manual_seed(0)
    hidden = torch.randn(50, 32, device=DEVICE)
    whole, chunked = torch.zeros(2, 1, 32, device=DEVICE)
    add_states(hidden, parts_of((0, 0, 50, 1)), whole)
    start = 0
    for length in (7, 1, 30, 12):
        add_states(hidden, parts_of((start, 0, length, int(start == 0))), chunked)
        start += length
    assert torch.equal(whole, chunked)
