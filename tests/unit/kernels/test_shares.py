"""The share of the expert that every token goes to, against the plain layer: by Triton's interpreter, or on a GPU."""

import pytest
import torch

from llm.kernels.norm import Norm, ResidualStream
from llm.kernels.quantization import EightBitRows
from llm.kernels.shares import scale_by_share
from llm.models.experts import ShareGate
from llm.models.layers import RMSNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("offset", [None, 1.0])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_rows_are_scaled_by_the_share_of_their_token(dtype, offset, is_narrow):
    """Narrow rows by their scale; there, tokens' adapters add to the product with the gate, too."""
    torch.manual_seed(0)
    norm, gate = RMSNorm(40, 1e-5, offset), ShareGate(40)
    norm.weight.data.uniform_(0.5, 1.5)
    gate.weight.data.normal_()
    norm, gate = norm.to(DEVICE, dtype).requires_grad_(False), gate.to(DEVICE, dtype).requires_grad_(False)
    total, rows = torch.randn(5, 40, device=DEVICE).to(dtype), torch.randn(5, 24, device=DEVICE).to(dtype)
    more = torch.randn(5, 1, device=DEVICE) if is_narrow else None
    share = gate(norm(total)) if more is None else (norm(total) @ gate.weight.t() + more.to(dtype)).sigmoid()
    assert share.amax() - share.amin() > 0.3, "tokens take different shares"
    stream, as_read = ResidualStream(total), Norm(norm.weight, norm.eps, norm.offset)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    if is_narrow:
        narrow = EightBitRows(rows, torch.rand(5, 1, device=DEVICE), dtype)
        expected = narrow.scales * share.float()
        scale_by_share(stream, as_read, gate.weight, narrow, more)
        torch.testing.assert_close(narrow.scales, expected, **tolerance)
    else:
        expected = rows * share
        scale_by_share(stream, as_read, gate.weight, rows)
        torch.testing.assert_close(rows, expected, **tolerance)
