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


@dataclass(frozen=True, slots=True)
class Draws:
    """Next tokens of some rows, still on the device and perhaps still being computed.

    Attributes:
        token_ids: (rows,) int64.
        logprobs: (rows,) float32, of the drawn tokens; None if no row asked for log probabilities.
        top_logprobs: (rows, most that any row asked for) float32, highest first; None in the same case.
        top_ids: same shape, int64; None in the same case.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None

    def to_host(self, rows: Sequence[SamplingRow]) -> list[Draw]:
        """Wait for the device; return each row's token, with the log probabilities that the row asked for.

        Args:
            rows: the rows that were drawn.
        """
        token_ids = self.token_ids.tolist()
        if self.logprobs is None or self.top_logprobs is None or self.top_ids is None:
            return list(map(Draw, token_ids))
        per_row = zip(
            rows, token_ids, self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True
        )
        return [
            Draw(token_id)
            if (num := row.num_logprobs) is None
            else Draw(token_id, logprob, tuple(zip(ids[:num], values[:num], strict=True)))
            for row, token_id, logprob, ids, values in per_row
        ]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Draw]:
    """Draw the next token of each row and wait for it: `draw`, then `Draws.to_host`."""
    return draw(logits, rows).to_host(rows)


@torch.inference_mode()
def draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Draws:
    """Draw the next token of each row; does not wait for a GPU.

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
        index = _send_ints(random, logits.device)
        cut = cut_unlikely(adjusted[index] if len(random) < len(rows) else adjusted, random_rows)
        noise = exponential_noise([(row.seed, row.position) for row in random_rows], logits.shape[1], logits.device)
        token_ids[index] = (cut - noise.log()).argmax(-1)
    token_ids[~highest.isfinite()] = NOTHING
    if all(row.num_logprobs is None for row in rows):
        return Draws(token_ids)
    logprobs = logits.log_softmax(-1)
    num_top = max(row.num_logprobs or 0 for row in rows)
    top_ids = likeliest(_bound(logits, rows, lambda row: row.are_top_allowed), min(num_top, logprobs.shape[1]))
    drawn = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    return Draws(token_ids, drawn, logprobs.gather(1, top_ids), top_ids)


def likeliest(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of each row's highest logits (rows, vocab_size) float32, highest first; the lowest id first among equals."""
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 32) | (_MASK32 - torch.arange(logits.shape[1], device=logits.device))
    return keys.topk(num_top, dim=-1).indices


def _send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a host tensor to `device`; the host does not wait for the copy."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # from the caching allocator, which keeps it until the copy is done
    return tensor.to(device, non_blocking=True)


def _send_ints(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    return _send(torch.tensor(values, dtype=torch.int64), device)


def _send_floats(values: Sequence[float], device: torch.device | str) -> torch.Tensor:
    return _send(torch.tensor(values, dtype=torch.float32), device)


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
            ids = _send_ints(list(row.logit_bias), logits.device)
            adjusted[i, ids] += _send_floats(list(row.logit_bias.values()), logits.device)
        if row.banned_ids:
            adjusted[i, _send_ints(row.banned_ids, logits.device)] = -torch.inf
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
    index = _send_ints(bound, logits.device)
    return logits.index_put((index,), logits[index].masked_fill(~is_allowed, -torch.inf))


def _unpack_bits(masks: npt.NDArray[np.int32], num_bits: int, device: torch.device) -> torch.Tensor:
    """Words (rows, words) as bits (rows, num_bits) bool on `device`, starting with the lowest of the first word."""
    if device.type == "cpu":
        bits = np.unpackbits(masks.view(np.uint8), axis=1, count=num_bits, bitorder="little")
        return torch.from_numpy(bits).bool()
    words = _send(torch.from_numpy(masks), device).unsqueeze(-1)
    unpacked = (words >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    return unpacked.flatten(1)[:, :num_bits].bool()


def _penalise(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply the row's penalties to its logits (vocab_size,) in place."""
    vocab_size = logits.shape[0]
    counts = torch.bincount(torch.tensor(row.output_ids, dtype=torch.int64), minlength=vocab_size)
    counts = _send(counts, logits.device)
    if row.repetition_penalty != 1:
        seen = counts > 0
        seen[_send_ints(row.prompt_ids, logits.device)] = True
        divided = torch.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
        logits.copy_(torch.where(seen, divided, logits))
    logits -= row.frequency_penalty * counts + row.presence_penalty * (counts > 0)


def cut_unlikely(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits divided by temperature, -inf where top-k, top-p or min-p exclude a token. (rows, vocab_size) float32.

    A tie at a cut keeps every token of equal logit, so that the result does not depend on the order of a sort.
    """
    device = logits.device
    scaled = logits / _send_floats([row.temperature for row in rows], device).unsqueeze(1)
    for i, row in enumerate(rows):
        if row.top_k is not None and row.top_k < scaled.shape[1]:
            threshold = scaled[i].topk(row.top_k).values[-1]
            scaled[i].masked_fill_(scaled[i] < threshold, -torch.inf)
    rows_with_top_p = [i for i, row in enumerate(rows) if row.top_p < 1]
    if rows_with_top_p:
        needs_top_p = _send_ints(rows_with_top_p, device)
        part = scaled[needs_top_p]
        ordered = part.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(-1)
        top_p = _send_floats([rows[i].top_p for i in rows_with_top_p], device).unsqueeze(1)
        # A token stays if the probability before it has not reached top_p; so the first always stays.
        num_kept = (probabilities.cumsum(-1) - probabilities < top_p).sum(-1, keepdim=True)
        threshold = ordered.gather(1, (num_kept - 1).clamp(min=0))  # none is kept if one is NaN
        scaled[needs_top_p] = part.masked_fill(part < threshold, -torch.inf)
    min_p = [row.min_p for row in rows]
    if any(min_p):
        threshold = scaled.amax(-1, keepdim=True) + _send_floats(min_p, device).log().unsqueeze(1)
        scaled.masked_fill_(scaled < threshold, -torch.inf)
    return scaled


def exponential_noise(draws: Sequence[tuple[int, int]], vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """Exponential(1) noise, (draws, vocab_size) float32, a pure function of each draw's (seed, position).

    Argmax of `logits - noise.log()` draws from softmax(logits) (the Gumbel-max trick). The noise of a token is a
    counter-based hash (two rounds of the "lowbias32" mixer by Chris Wellons) of its id under a 64-bit key made from
    (seed, position) by SplitMix64 (Steele et al. 2014), so it is the same on every device, in every batch, and for a
    resumed request.
    """
    keys = [_draw_key(seed, position) for seed, position in draws]
    low = _send_ints([key & _MASK32 for key in keys], device).unsqueeze(1)
    high = _send_ints([key >> 32 for key in keys], device).unsqueeze(1)
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
