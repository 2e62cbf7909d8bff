"""From logits to the next token: penalties, cuts, and a draw whose noise depends only on (seed, position)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import torch

_GREEDY_BELOW = 1e-5
NOTHING = -1
"""The token of a row whose logits hold NaN or +inf, or forbid everything. Other rows are not affected."""
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row's next token is drawn. Fields mean the same as in `GenerationRequest`."""

    seed: int
    position: int
    """Position of the token to be drawn; the prompt's first token has position 0."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    """Needed only for the repetition penalty."""
    output_ids: Sequence[int] = ()
    """Needed only for penalties."""
    banned_ids: Sequence[int] = ()
    """Ids that must not be drawn."""
    allowed: npt.NDArray[np.int32] | None = None
    """One bit for each id, set if it may be drawn, starting with the lowest bit of the first word; None for all."""
    num_logprobs: int | None = None
    are_top_allowed: bool = False
    """Whether only the allowed ids count among the likeliest; they must be as many as `num_logprobs`."""

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature < _GREEDY_BELOW


class Draw(msgspec.Struct, frozen=True, gc=False):
    """One row's next token, with log probabilities if the row asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

    def scores(self, token_ids: Sequence[int]) -> bytes:
        """Log probabilities of these ids, all of them among the likeliest, in their order, as 32-bit floats."""
        found = dict(self.top)
        return np.array([found[token_id] for token_id in token_ids], dtype=np.float32).tobytes()


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Draw]:
    """Draw the next token of each row.

    Order of operations: repetition, presence and frequency penalties; bias; banned ids and those not allowed; then, for
    rows that are not greedy, temperature, top-k, top-p, min-p, and a draw by the Gumbel-max trick. A row's draw does
    not depend on other rows; if there is nothing to draw, the token is `NOTHING`.

    Args:
        logits: (rows, vocab_size), any float type. Not changed.
    """
    logits = logits.float()
    adjusted = _adjust(logits, rows)
    highest = adjusted.amax(-1)  # NaN if there is one
    token_ids = adjusted.argmax(-1)
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    if random:
        random_rows = [rows[i] for i in random]
        cut = cut_unlikely(adjusted[random] if len(random) < len(rows) else adjusted, random_rows)
        noise = exponential_noise([(row.seed, row.position) for row in random_rows], logits.shape[1], logits.device)
        token_ids[random] = (cut - noise.log()).argmax(-1)
    token_ids[~highest.isfinite()] = NOTHING
    if all(row.num_logprobs is None for row in rows):
        return list(map(Draw, token_ids.tolist()))
    logprobs = logits.log_softmax(-1)
    num_top = max(row.num_logprobs or 0 for row in rows)
    top_ids = likeliest(_bound(logits, rows, lambda row: row.are_top_allowed), min(num_top, logprobs.shape[1]))
    drawn = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    found = token_ids, drawn, top_ids, logprobs.gather(1, top_ids)
    return [
        Draw(token_id)
        if (num := row.num_logprobs) is None
        else Draw(token_id, logprob, tuple(zip(ids[:num], values[:num], strict=True)))
        for row, token_id, logprob, ids, values in zip(rows, *(tensor.tolist() for tensor in found), strict=True)
    ]


def likeliest(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of each row's highest logits (rows, vocab_size) float32, highest first; the lowest id first among equals."""
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 32) | (_MASK32 - torch.arange(logits.shape[1], device=logits.device))
    return keys.topk(num_top, dim=-1).indices


def _adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits after penalties, bias and bans; the same tensor if no row asks for any."""
    adjusted = logits
    for i, row in enumerate(rows):
        penalised = row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
        if not (penalised or row.logit_bias or row.banned_ids):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        if penalised:
            _penalise(adjusted[i], row)
        if row.logit_bias:
            values = torch.tensor(list(row.logit_bias.values()), dtype=torch.float32, device=logits.device)
            adjusted[i, list(row.logit_bias)] += values
        if row.banned_ids:
            adjusted[i, list(row.banned_ids)] = -torch.inf
    return _bound(adjusted, rows, lambda _: True)


def _bound(logits: torch.Tensor, rows: Sequence[SamplingRow], concerns: Callable[[SamplingRow], bool]) -> torch.Tensor:
    """Logits with -inf for what rows do not allow, of those rows that this concerns; the same tensor if it is none."""
    bound = [i for i, row in enumerate(rows) if row.allowed is not None and concerns(row)]
    if not bound:
        return logits
    masks = np.stack([mask for i in bound if (mask := rows[i].allowed) is not None])
    is_allowed = _unpack_bits(masks, logits.shape[1], logits.device)
    if len(bound) == len(rows):
        return logits.masked_fill(~is_allowed, -torch.inf)
    index = torch.tensor(bound, device=logits.device)
    return logits.index_put((index,), logits[index].masked_fill(~is_allowed, -torch.inf))


def _unpack_bits(masks: npt.NDArray[np.int32], num_bits: int, device: torch.device) -> torch.Tensor:
    """Words (rows, words) as bits (rows, num_bits) bool on `device`, starting with the lowest of the first word."""
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=num_bits, bitorder="little")
    return torch.from_numpy(bits).to(device).bool()


def _penalise(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply the row's penalties to its logits (vocab_size,) in place."""
    vocab_size = logits.shape[0]
    output_ids = torch.tensor(row.output_ids, dtype=torch.int64, device=logits.device)
    counts = torch.bincount(output_ids, minlength=vocab_size)
    if row.repetition_penalty != 1:
        seen = counts > 0
        seen[torch.tensor(row.prompt_ids, dtype=torch.int64, device=logits.device)] = True
        divided = torch.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
        logits.copy_(torch.where(seen, divided, logits))
    logits -= row.frequency_penalty * counts + row.presence_penalty * (counts > 0)


def cut_unlikely(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits divided by temperature, -inf where top-k, top-p or min-p exclude a token. (rows, vocab_size) float32.

    A tie at a cut keeps every token of equal logit, so that the result does not depend on the order of a sort.
    """
    device = logits.device
    scaled = logits / _column([row.temperature for row in rows], device)
    for i, row in enumerate(rows):
        if row.top_k is not None and row.top_k < scaled.shape[1]:
            threshold = scaled[i].topk(row.top_k).values[-1]
            scaled[i].masked_fill_(scaled[i] < threshold, -torch.inf)
    rows_with_top_p = [i for i, row in enumerate(rows) if row.top_p < 1]
    if rows_with_top_p:
        part = scaled[rows_with_top_p]
        ordered = part.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(-1)
        top_p = _column([rows[i].top_p for i in rows_with_top_p], device)
        # A token stays if the probability before it has not reached top_p; so the first always stays.
        num_kept = (probabilities.cumsum(-1) - probabilities < top_p).sum(-1, keepdim=True)
        threshold = ordered.gather(1, (num_kept - 1).clamp(min=0))  # none is kept if one is NaN
        scaled[rows_with_top_p] = part.masked_fill(part < threshold, -torch.inf)
    min_p = [row.min_p for row in rows]
    if any(min_p):
        threshold = scaled.amax(-1, keepdim=True) + _column(min_p, device).log()
        scaled.masked_fill_(scaled < threshold, -torch.inf)
    return scaled


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """(rows, 1) float32, a value for each row."""
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


def exponential_noise(draws: Sequence[tuple[int, int]], vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """Exponential(1) noise, (draws, vocab_size) float32, a pure function of each draw's (seed, position).

    Argmax of `logits - noise.log()` draws from softmax(logits) (the Gumbel-max trick). The noise of a token is a
    counter-based hash (two rounds of the "lowbias32" mixer by Chris Wellons) of its id under a 64-bit key made from
    (seed, position) by SplitMix64 (Steele et al. 2014), so it is the same on every device, in every batch, and for a
    resumed request.
    """
    keys = [_draw_key(seed, position) for seed, position in draws]
    low, high = (
        torch.tensor(halves, device=device).unsqueeze(1)
        for halves in ([key & _MASK32 for key in keys], [key >> 32 for key in keys])
    )
    bits = _mix32(_mix32(torch.arange(vocab_size, device=device) ^ low) ^ high)
    uniform = (bits.double() + 0.5) * 2.0**-32
    # Small exponentials decide the draw; -log1p(-u) keeps their precision, which -log(u) would lose.
    return -torch.log1p(-uniform).float()


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """Mix the low 32 bits of int64 values into 32 evenly spread bits."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _draw_key(seed: int, position: int) -> int:
    """64-bit key of one draw: SplitMix64 over seed, then over position."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ position)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
