"""From logits to the next token: penalties, cuts, and a draw whose noise depends on (seed, position) alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

_GREEDY_BELOW = 1e-5
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row's next token is drawn. Field meanings as in `GenerationRequest`."""

    seed: int
    position: int
    """Of the token to be drawn, from 0 for the first token of the prompt."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    """Needed for the repetition penalty only."""
    output_ids: Sequence[int] = ()
    """Needed for penalties only."""
    banned_ids: Sequence[int] = ()
    """Ids that must not be drawn."""
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's next token, with log probabilities where the row asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Draw]:
    """Draw the next token of each row.

    Order of operations: repetition, presence and frequency penalties; bias; banned ids; then for rows that are not
    greedy temperature, top-k, top-p, min-p, and a draw by the Gumbel-max trick. A row's draw depends on nothing in
    other rows.

    Args:
        logits: (rows, vocab_size), any float type. Not changed.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1) if any(row.num_logprobs is not None for row in rows) else None
    adjusted = _adjust(logits, rows)
    token_ids = adjusted.argmax(-1)
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    if random:
        random_rows = [rows[i] for i in random]
        cut = cut_unlikely(adjusted[random] if len(random) < len(rows) else adjusted, random_rows)
        noise = exponential_noise([(row.seed, row.position) for row in random_rows], logits.shape[1], logits.device)
        token_ids[random] = (cut - noise.log()).argmax(-1)
    if logprobs is None:
        return [Draw(token_id) for token_id in token_ids.tolist()]
    return _with_logprobs(token_ids, logprobs, rows)


def _adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits after penalties, bias and bans; the same tensor where no row asks for any."""
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
            ids = torch.tensor(list(row.logit_bias), device=logits.device)
            adjusted[i, ids] += torch.tensor(list(row.logit_bias.values()), device=logits.device)
        if row.banned_ids:
            adjusted[i, torch.tensor(row.banned_ids, device=logits.device)] = -torch.inf
    return adjusted


def _penalise(logits: torch.Tensor, row: SamplingRow) -> None:
    """Apply the row's penalties to its logits (vocab_size,) in place."""
    vocab_size = logits.shape[0]
    counts = torch.bincount(torch.tensor(row.output_ids, dtype=torch.long), minlength=vocab_size).to(logits.device)
    if row.repetition_penalty != 1:
        seen = counts > 0
        seen[torch.tensor(row.prompt_ids, dtype=torch.long, device=logits.device)] = True
        divided = torch.where(logits > 0, logits / row.repetition_penalty, logits * row.repetition_penalty)
        logits.copy_(torch.where(seen, divided, logits))
    logits -= row.frequency_penalty * counts + row.presence_penalty * (counts > 0)


def cut_unlikely(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits over temperature, with -inf where top-k, top-p or min-p leave a token out. (rows, vocab_size) float32.

    A tie at a cut keeps every token of equal logit, so that the outcome does not depend on the order of a sort.
    """
    device = logits.device
    scaled = logits / torch.tensor([row.temperature for row in rows], device=device).unsqueeze(1)
    for i, row in enumerate(rows):
        if row.top_k is not None and row.top_k < scaled.shape[1]:
            threshold = scaled[i].topk(row.top_k).values[-1]
            scaled[i].masked_fill_(scaled[i] < threshold, -torch.inf)
    needs_top_p = [i for i, row in enumerate(rows) if row.top_p < 1]
    if needs_top_p:
        part = scaled[needs_top_p]
        ordered = part.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(-1)
        top_p = torch.tensor([rows[i].top_p for i in needs_top_p], device=device).unsqueeze(1)
        # A token stays while the probability before it has not reached top_p; so the first always stays.
        num_kept = (probabilities.cumsum(-1) - probabilities < top_p).sum(-1, keepdim=True)
        threshold = ordered.gather(1, num_kept - 1)
        scaled[needs_top_p] = part.masked_fill(part < threshold, -torch.inf)
    min_p = [row.min_p for row in rows]
    if any(min_p):
        threshold = scaled.amax(-1, keepdim=True) + torch.tensor(min_p, device=device).log().unsqueeze(1)
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
    low = torch.tensor([key & _MASK32 for key in keys], device=device).unsqueeze(1)
    high = torch.tensor([key >> 32 for key in keys], device=device).unsqueeze(1)
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


def _with_logprobs(token_ids: torch.Tensor, logprobs: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Draw]:
    """Pair each drawn token with its log probability and the likeliest tokens', as the rows ask."""
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    num_top = max(row.num_logprobs or 0 for row in rows)
    top_values, top_ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    draws = []
    for i, (row, token_id) in enumerate(zip(rows, token_ids.tolist(), strict=True)):
        if row.num_logprobs is None:
            draws.append(Draw(token_id))
            continue
        ids, values = top_ids[i, : row.num_logprobs].tolist(), top_values[i, : row.num_logprobs].tolist()
        draws.append(Draw(token_id, own[i], tuple(zip(ids, values, strict=True))))
    return draws
