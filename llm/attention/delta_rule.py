"""The gated delta rule in plain PyTorch: attention with a memory of fixed size.

Gated Delta Networks (Yang et al. 2024, arXiv:2412.06464). A head's memory is a matrix S that maps keys to values. A
token lets it fade by its decay a, corrects what it holds for the token's key k towards its value v by a share b, and
reads it with the query q:

    S ← a S + b (v - a S k) kᵀ        o = S q

Here chunks of tokens are worked out at once, as in section 3.3 there: within a chunk the corrections depend on each
other by a triangular system, which is solved for all of them.
"""

import torch
import torch.nn.functional as F

from llm.core.recurrent_state import DeltaSpec, RecurrentState

CHUNK = 64
"""Tokens whose corrections are worked out at once."""
NORM_EPS = 1e-6
"""Added to the squared length of queries and keys, before these are brought to length 1."""


def mix_tokens(
    spec: DeltaSpec,
    inputs: torch.Tensor,
    conv_weight: torch.Tensor,
    log_decay: torch.Tensor,
    share: torch.Tensor,
    state: RecurrentState,
) -> tuple[torch.Tensor, RecurrentState]:
    """The short convolution, then the rule, for the next tokens of some sequences.

    Args:
        inputs: (sequences, tokens, conv_size).
        conv_weight: (conv_size, 1, kernel_size).
        log_decay: (sequences, tokens, num_value_heads) float32, at most 0.
        share: the same shape, float32, from 0 to 1.
        state: of the sequences; it is left as it is.

    Returns:
        Outputs, (sequences, tokens, num_value_heads, value_dim), in the format of `inputs`, and the next states.
    """
    convolved, tail = short_convolution(inputs, conv_weight, state.tail)
    sizes = [spec.num_key_heads * spec.key_dim] * 2 + [spec.output_size]
    query, key, value = convolved.float().split_with_sizes(sizes, dim=-1)
    query, key = (
        _unit(heads.view(*heads.shape[:-1], spec.num_key_heads, spec.key_dim)).repeat_interleave(
            spec.num_value_heads // spec.num_key_heads, dim=-2
        )
        for heads in (query, key)
    )
    value = value.view(*value.shape[:-1], spec.num_value_heads, spec.value_dim)
    output, matrix = gated_delta_rule(query * spec.key_dim**-0.5, key, value, log_decay, share, state.matrix)
    return output.to(inputs.dtype), RecurrentState(tail, matrix)


def short_convolution(
    inputs: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU of a causal convolution of each channel with its own weights.

    Args:
        inputs: (sequences, tokens, channels).
        weight: (channels, 1, kernel_size), that of the newest token last.
        tail: (sequences, kernel_size - 1, channels), the inputs before.

    Returns:
        Outputs, of the inputs' shape, and the next tail.
    """
    num_tokens, kernel_size = inputs.shape[1], weight.shape[-1]
    extended = torch.cat([tail, inputs], dim=1)
    wide, factors = extended.float(), weight.float()[:, 0]
    total = sum(wide[:, i : i + num_tokens] * factors[:, i] for i in range(kernel_size))
    assert isinstance(total, torch.Tensor), "a convolution sees the token itself at least"
    return F.silu(total).to(inputs.dtype), extended[:, num_tokens:]


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    share: torch.Tensor,
    matrix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule over (sequences, tokens, heads, …) tensors, float32 throughout.

    Args:
        query, key: (sequences, tokens, heads, key_dim).
        value: (sequences, tokens, heads, value_dim).
        log_decay, share: (sequences, tokens, heads).
        matrix: (sequences, heads, value_dim, key_dim), the memory before the first token; it is left as it is.

    Returns:
        Outputs, of the values' shape, and the memory behind the last token.
    """
    query, key, value, log_decay, share = (x.transpose(1, 2) for x in (query, key, value, log_decay, share))
    outputs = []
    for start in range(0, key.shape[2], CHUNK):
        chunk = slice(start, start + CHUNK)
        output, matrix = _run_chunk(
            query[:, :, chunk], key[:, :, chunk], value[:, :, chunk], log_decay[:, :, chunk], share[:, :, chunk], matrix
        )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), matrix


def _run_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    share: torch.Tensor,
    matrix: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule over one chunk, (sequences, heads, tokens, …)."""
    num_tokens = key.shape[2]
    faded = log_decay.cumsum(-1)
    is_before = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=key.device).tril()
    # From the decay of token j, exclusive, to that of token i; never exp of a positive number, which could overflow.
    between = (faded.unsqueeze(-1) - faded.unsqueeze(-2)).masked_fill(~is_before, -torch.inf).exp()
    since_start = faded.exp().unsqueeze(-1)
    keys_t = key.transpose(-1, -2)
    wanted = value - since_start * (key @ matrix.transpose(-1, -2))
    # Token i corrects what the tokens before it have left to correct: (1 + share kᵀk between, below the diagonal) x.
    system = share.unsqueeze(-1) * (key @ keys_t) * between
    correction = torch.linalg.solve_triangular(system, share.unsqueeze(-1) * wanted, upper=False, unitriangular=True)
    output = since_start * (query @ matrix.transpose(-1, -2)) + ((query @ keys_t) * between) @ correction
    until_end = (faded[..., -1:] - faded).exp().unsqueeze(-1)
    matrix = faded[..., -1, None, None].exp() * matrix + correction.transpose(-1, -2) @ (until_end * key)
    return output, matrix


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors in the last dimension, brought to length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
