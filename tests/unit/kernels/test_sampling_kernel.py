"""The draw's kernels against `llm.sampling.draw` and float64: by Triton's interpreter, or on a GPU."""

import numpy as np
import pytest
import torch

from llm.core.uploads import Uploads
from llm.kernels import sampling as kernels
from llm.kernels.sampling import DrawnTokens, SamplingWorkspace, draw_tokens, find_thresholds
from llm.sampling.constraint import words_of
from llm.sampling.draw import NOTHING, SamplingRow, cut_unlikely, exponential_noise, sample
from llm.sampling.row_state import RowStart, RowState
from llm.serving.schemas import GenerationRequest

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's wrapping and dividing by zero

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_SPARE_ROWS = 3
POISON = -7
TOP_P_SLACK = 2e-5
"""How far two float32 sums of probabilities may be apart."""

KINDS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.5, "top_k": 50, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.05},
    {"top_k": 200, "top_p": 0.99, "min_p": 0.01},
    {"temperature": 3.0, "top_p": 0.999},
    {"top_k": 1},
    {"top_p": 1e-4},
]


def create_rows(kinds: list[dict[str, float]], seed: int = 0) -> list[SamplingRow]:
    """A row of each kind, with any seed and position."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(kinds),), generator=generator).tolist()
    positions = torch.randint(0, 100_000, (len(kinds),), generator=generator).tolist()
    return [SamplingRow(seed, position, **kind) for seed, position, kind in zip(seeds, positions, kinds, strict=True)]


def create_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3 - 2
    return logits.to(dtype).to(DEVICE)


def start_of(place: int, row: SamplingRow) -> RowStart:
    """The same row as a request's."""
    allowed = None
    if row.allowed is not None:
        allowed = tuple(np.unpackbits(row.allowed.view(np.uint8), bitorder="little").nonzero()[0].tolist())
    if row.are_top_allowed:
        request = GenerationRequest(
            prompt_token_ids=(0,), max_new_tokens=0, seed=row.seed, scores_allowed=True, allowed_token_ids=allowed,
            temperature=row.temperature,
        )  # fmt: skip
        return RowStart(place, request, (), (), frozenset(), row.position)
    request = GenerationRequest(
        prompt_token_ids=(0,), max_new_tokens=10_000, seed=row.seed, temperature=row.temperature, top_k=row.top_k,
        top_p=row.top_p, min_p=row.min_p, presence_penalty=row.presence_penalty, logprobs=row.num_logprobs,
        frequency_penalty=row.frequency_penalty, repetition_penalty=row.repetition_penalty, logit_bias=row.logit_bias,
        min_new_tokens=1 if row.banned_ids else 0, allowed_token_ids=allowed,
    )  # fmt: skip
    return RowStart(place, request, row.prompt_ids, row.output_ids, frozenset(row.banned_ids), row.position)


class Drawing:
    """The arguments of `draw_tokens` for some rows, in scattered places, with everything to be written poisoned."""

    def __init__(self, logits: torch.Tensor, rows: list[SamplingRow], capacity: int = 64) -> None:
        num_draws, num_rows, vocab_size = len(rows), len(rows) + NUM_SPARE_ROWS, logits.shape[1]
        self.logits = logits
        place = torch.randperm(num_rows, generator=torch.Generator().manual_seed(num_rows))[:num_draws]
        self.rows = place.int().to(DEVICE)
        self.positions = torch.tensor([row.position for row in rows], dtype=torch.int32, device=DEVICE)
        self.rows_state = RowState(num_rows, vocab_size, DEVICE, Uploads(DEVICE, 1 << 16, 1))
        self.state = self.rows_state.tensors
        self.state.counts.fill_(POISON)
        self.rows_state.start([start_of(*pair) for pair in zip(place.tolist(), rows, strict=True)])
        self.workspace = SamplingWorkspace.allocate(num_draws, vocab_size, DEVICE, capacity=capacity)
        logprobs = self.workspace.logprobs
        tensors = [getattr(self.workspace, name) for name in SamplingWorkspace.__slots__ if name != "logprobs"]
        for tensor in (*tensors, logprobs.stats, logprobs.keys):
            tensor.fill_(float("nan") if tensor.is_floating_point() else POISON)
        self.output = DrawnTokens.allocate(num_draws + 1, DEVICE)
        self.output.token_ids.fill_(POISON)
        self.output.logprobs.fill_(POISON)
        self.last_token_ids = torch.full((num_rows,), POISON, dtype=torch.int32, device=DEVICE)

    def launch(self, *, are_plain: bool = False) -> None:
        draw_tokens(
            self.logits, self.rows, self.positions, self.state, self.workspace, self.output, self.last_token_ids,
            are_plain=are_plain,
        )  # fmt: skip

    def token_ids(self, *, are_plain: bool = False) -> list[int]:
        """Draw; what must be written is, and nothing else."""
        self.launch(are_plain=are_plain)
        token_ids = self.output.token_ids.tolist()
        assert token_ids.pop() == POISON
        assert self.last_token_ids[self.rows.long()].tolist() == [max(token_id, 0) for token_id in token_ids]
        assert (self.last_token_ids == POISON).sum() == NUM_SPARE_ROWS
        return token_ids

    def thresholds(self) -> torch.Tensor:
        find_thresholds(self.logits, self.rows, self.positions, self.state, self.workspace)
        return self.workspace.thresholds


def surely_and_perhaps_kept(logits: torch.Tensor, row: SamplingRow) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cuts of a row keep by float64, whatever float32 may round; and what they may keep."""
    scaled = logits.double() / torch.tensor(row.temperature).double().item()
    slack = 4e-7 * scaled[scaled.isfinite()].abs().max()
    kept = torch.ones(2, len(scaled), dtype=torch.bool)
    if row.top_k is not None and row.top_k < len(scaled):
        threshold = scaled.topk(row.top_k).values[-1]
        kept &= torch.stack([scaled >= threshold, scaled >= threshold - slack])
    if row.top_p < 1:
        ordered, order = torch.where(kept[0], scaled, -torch.inf).sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        first_equal = torch.searchsorted(-ordered, -ordered)  # a tie is kept if its first token is
        before = torch.empty_like(before).scatter_(0, order, before[first_equal])
        kept &= torch.stack([before < row.top_p - TOP_P_SLACK, before < row.top_p + TOP_P_SLACK])
        kept[:, scaled == scaled.max()] = True
    if row.min_p > 0:
        threshold = scaled.max() + torch.tensor(row.min_p).double().log()
        kept &= torch.stack([scaled >= threshold + slack, scaled >= threshold - slack])
    return kept[0], kept[1]


def is_right(token_id: int, logits: torch.Tensor, row: SamplingRow) -> bool:
    """Whether float64 has no token that is better than `token_id` by more than rounding in float32."""
    if row.is_greedy:
        return token_id == logits.float().argmax()
    scaled = logits.double() / torch.tensor(row.temperature).double().item()
    scores = scaled - exponential_noise([(row.seed, row.position)], len(logits), "cpu")[0].double().log()
    surely, perhaps = surely_and_perhaps_kept(logits, row)
    rounding = 4e-7 * (scaled[scaled.isfinite()].abs().max().item() + 25)
    return bool(perhaps[token_id]) and scores[token_id].item() >= scores[surely].max().item() - rounding


def assert_equal_to_reference(logits: torch.Tensor, rows: list[SamplingRow], token_ids: list[int]) -> None:
    """The reference's tokens; another only where float64 proves that either is as good, in one draw of 50 at most."""
    logits = logits.cpu()
    expected = [draw.token_id for draw in sample(logits, rows)]
    different = [i for i, token_id in enumerate(token_ids) if token_id != expected[i]]
    assert len(different) <= 1 + len(rows) // 50
    for i in different:
        assert is_right(token_ids[i], logits[i], rows[i]), f"row {i}: {token_ids[i]}, not {expected[i]}"
        assert is_right(expected[i], logits[i], rows[i])


def assert_keeps_what_the_reference_keeps(logits: torch.Tensor, rows: list[SamplingRow], thresholds) -> None:
    """Exactly the same set, but for tokens that float64 cannot tell to be in or out."""
    logits = logits.cpu().float()
    expected = cut_unlikely(logits, rows).isfinite()
    kept = (logits >= thresholds.cpu().unsqueeze(1)) & logits.isfinite()
    for i, row in enumerate(rows):
        differs = kept[i] != expected[i]
        if differs.any():
            surely, perhaps = surely_and_perhaps_kept(logits[i], row)
            assert not differs[surely == perhaps].any(), f"row {i}: {kept[i].sum()} kept, not {expected[i].sum()}"
            assert len(logits[i][differs].unique()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 300, 1031, 4112])
def test_draws_are_the_references(vocab_size, dtype):
    """Rows of every kind together, whatever the size."""
    rows = create_rows(KINDS, seed=vocab_size)
    logits = create_logits(len(rows), vocab_size, dtype, seed=vocab_size)
    assert_equal_to_reference(logits, rows, Drawing(logits, rows).token_ids())


@pytest.mark.parametrize("num_draws", [1, 7])
def test_few_draws_without_cuts(num_draws):
    rows = create_rows([{"temperature": 0.8}] * num_draws, seed=num_draws)
    logits = create_logits(num_draws, 2500)
    assert_equal_to_reference(logits, rows, Drawing(logits, rows).token_ids())


def test_noise_is_the_references_from_end_to_end():
    """Over two equal tokens the noise alone decides; 300 draws of it, with the whole range of the uniform in them."""
    rows = create_rows([{}] * 300)
    logits = torch.zeros(300, 2, device=DEVICE)
    token_ids = Drawing(logits, rows, capacity=2).token_ids()
    assert_equal_to_reference(logits, rows, token_ids)
    assert 100 < sum(token_ids) < 200


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [16, 4096])
def test_cuts_keep_what_the_reference_keeps(capacity, dtype):
    """By many passes over the logits (few candidates fit) or by one; cuts of every kind alone and together."""
    kinds: list[dict[str, float]] = [{"top_k": k} for k in (1, 2, 8, 17, 500, 2999)]
    kinds += [{"top_p": p, "temperature": t} for p in (0.01, 0.5, 0.95, 0.9999) for t in (0.3, 1.0, 5.0)]
    kinds += [{"top_k": k, "top_p": 0.7, "min_p": m, "temperature": 1.9} for k in (5, 100, 2000) for m in (0, 0.03)]
    kinds += [{"min_p": m, "temperature": t} for m in (1e-6, 0.5, 1.0) for t in (0.2, 1.7)]
    rows = create_rows(kinds)
    logits = create_logits(len(rows), 3000, dtype)
    assert_keeps_what_the_reference_keeps(logits, rows, Drawing(logits, rows, capacity).thresholds())


@pytest.mark.parametrize("capacity", [16, 4096])
def test_ties_at_a_cut_are_all_kept(capacity):
    """Whole numbers tie by the hundred, more than there is room for candidates; equal logits all tie."""
    kinds: list[dict[str, float]] = [{"top_k": 1}, {"top_k": 50}, {"top_k": 40, "top_p": 0.5}, {"top_p": 0.3}] * 2
    rows = create_rows(kinds)
    logits = create_logits(len(rows), 2000).round()
    logits[len(kinds) // 2 :] = 1.5
    thresholds = Drawing(logits, rows, capacity).thresholds()
    assert_keeps_what_the_reference_keeps(logits, rows, thresholds)
    assert thresholds[len(kinds) // 2 :].tolist() == [1.5] * (len(kinds) // 2)


def test_logits_that_become_equal_by_the_temperature_tie():
    """The reference cuts what the temperature has divided: neighbours that round to one number are both kept."""
    kinds: list[dict[str, float]] = [{"top_k": 2, "temperature": 1 + i / 16} for i in range(15)]
    logits = torch.tensor([3.0, 1.9, 1.9, 0.5], device=DEVICE)
    logits[2] = torch.nextafter(logits[1], logits[0])
    logits = logits.expand(len(kinds), -1).contiguous()
    rows = create_rows(kinds)
    kept = (logits >= Drawing(logits, rows).thresholds().unsqueeze(1)).cpu()
    assert torch.equal(kept, cut_unlikely(logits.cpu(), rows).isfinite())
    assert {2, 3} == set(kept.sum(1).tolist()), "some temperatures make them equal, others do not"


def zeros_of_either_sign(logits: torch.Tensor) -> None:
    """The lowest logit is 0.0 in one row and -0.0 in the next, and either comes with the other."""
    logits.abs_()
    logits[:, -600:] = 0.0
    logits[:, -300:] = -0.0
    logits[::2] = logits[::2].flip(1)


EXTREMES = {
    "one far above": lambda x: x.index_fill_(1, torch.tensor([77]), 1e4),
    "mostly banned": lambda x: x[:, :-9].fill_(-torch.inf),
    "one not banned": lambda x: x[:, 1:].fill_(-torch.inf),
    "masked by the lowest number": lambda x: x[:, ::2].fill_(torch.finfo(torch.float32).min),
    "wide": lambda x: x.mul_(3000),
    "narrow": lambda x: x.mul_(1e-4),
    "tiny": lambda x: x.mul_(1e-41),
    "all equal": lambda x: x.fill_(-1e4),
    "zeros of either sign": zeros_of_either_sign,
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits(name):
    """What is drawn and what is kept, at the ends of the range."""
    rows = create_rows(KINDS, seed=3)
    logits = create_logits(len(rows), 1200).cpu()
    EXTREMES[name](logits)
    drawing = Drawing(logits.to(DEVICE), rows)
    token_ids = drawing.token_ids()
    assert_equal_to_reference(logits, rows, token_ids)
    assert all(logits[i, token_id] > -torch.inf for i, token_id in enumerate(token_ids))
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    thresholds = drawing.workspace.thresholds[random]
    assert_keeps_what_the_reference_keeps(logits[random], [rows[i] for i in random], thresholds)


def test_where_nothing_can_be_drawn_the_token_says_so():
    """All forbidden, NaN or +inf anywhere: no token, as in the reference; no other row is concerned."""
    rows = create_rows([*KINDS, *special_kinds(500)])
    logits = create_logits(len(rows), 500)
    expected = Drawing(logits, rows).token_ids()
    for value in (-torch.inf, torch.nan, torch.inf):
        for some in (slice(7, 8), slice(100, 400), slice(None)):
            spoiled = logits.clone()
            spoiled[::2, some] = value
            token_ids = Drawing(spoiled, rows).token_ids()
            assert token_ids == [draw.token_id for draw in sample(spoiled.cpu(), rows)]
            assert token_ids[1::2] == expected[1::2]
            if some == slice(None):
                assert token_ids[::2] == [NOTHING] * len(rows[::2])


def test_greedy_takes_the_lowest_id_of_the_likeliest():
    """Across blocks, whatever the cuts say, up to a temperature of 1e-5."""
    logits = create_logits(3, 3000)
    logits[:, [1023, 1024, 2999]] = 50.0
    kinds = [{"temperature": 0.0}, {"temperature": 9e-6, "top_k": 2, "top_p": 0.1, "min_p": 0.5}, {"temperature": 2e-5}]
    token_ids = Drawing(logits, create_rows(kinds)).token_ids()
    assert token_ids[:2] == [1023, 1023]
    assert token_ids[2] in (1023, 1024, 2999)


def test_a_draw_does_not_depend_on_the_rows_beside_it(monkeypatch):
    """Alone, and among others in blocks of another size."""
    rows = create_rows(KINDS)
    logits = create_logits(len(rows), 2500)
    alone = [Drawing(logits[i : i + 1], [row]) for i, row in enumerate(rows)]
    token_ids = [drawing.token_ids()[0] for drawing in alone]
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 1)
    together = Drawing(logits, rows)
    assert together.token_ids() == token_ids
    assert torch.equal(together.workspace.thresholds, torch.cat([drawing.workspace.thresholds for drawing in alone]))


def test_logits_may_be_part_of_a_wider_tensor():
    rows = create_rows(KINDS)
    wide = create_logits(len(rows), 1000)
    assert Drawing(wide[:, :700], rows).token_ids() == Drawing(wide[:, :700].contiguous(), rows).token_ids()


on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [128256, 50257])
def test_large_steps(vocab_size, dtype):
    """256 rows of a real vocabulary, with the capacity that serving uses."""
    rows = create_rows((KINDS * 26)[:256])
    logits = create_logits(256, vocab_size, dtype)
    drawing = Drawing(logits, rows, capacity=4096)
    assert_equal_to_reference(logits, rows, drawing.token_ids())
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    thresholds = drawing.workspace.thresholds[random]
    assert_keeps_what_the_reference_keeps(logits[random], [rows[i] for i in random], thresholds)


@on_gpu
@pytest.mark.gpu
def test_draws_in_a_graph():
    """A captured draw reads rows, positions, parameters and logits anew at each replay."""
    rows = create_rows(KINDS)
    drawing = Drawing(create_logits(len(rows), 32000), rows, capacity=4096)
    drawing.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawing.launch()
    for seed in range(3):
        drawing.logits.copy_(create_logits(len(rows), 32000, seed=seed))
        drawing.positions += 1
        drawing.output.token_ids.fill_(POISON)
        graph.replay()
        moved = create_rows(KINDS)
        expected = Drawing(drawing.logits, moved, capacity=4096)
        expected.positions.copy_(drawing.positions)
        assert drawing.output.token_ids[:-1].tolist() == expected.token_ids()


def words(vocab_size: int, share: float, seed: int = 0) -> np.ndarray:
    """Bits of some ids, the last of the vocabulary among them."""
    chosen = torch.rand(vocab_size, generator=torch.Generator().manual_seed(seed)) < share
    return words_of([*chosen.nonzero().flatten().tolist(), vocab_size - 1], vocab_size)


def special_kinds(vocab_size: int) -> list[dict]:
    """Every adjustment alone, all together, and each with cuts or none; a plain one between them."""
    ids = torch.randint(0, vocab_size, (400,), generator=torch.Generator().manual_seed(5)).tolist()
    prompt, output = ids[:200], [*ids[150:], *ids[150:250], ids[-1]]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.2}
    biases = {token_id: (i % 7 - 3) * 1.7 for i, token_id in enumerate(dict.fromkeys(ids))}
    seen = {"prompt_ids": prompt, "output_ids": output}
    every = {**penalties, **seen, "logit_bias": biases, "banned_ids": ids[:5], "allowed": words(vocab_size, 0.5)}
    return [
        {"repetition_penalty": 1.05, **seen},
        {"repetition_penalty": 0.6, **seen, "temperature": 0.0},
        {"presence_penalty": 1.1, "output_ids": output, "top_p": 0.9},
        {"frequency_penalty": 0.3, "output_ids": output, "temperature": 0.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "output_ids": []},
        {"temperature": 0.8, "top_k": 30},
        {"logit_bias": biases, "temperature": 0.0},
        {"logit_bias": {vocab_size - 1: 100.0, 0: -100.0}, "top_k": 5, "temperature": 1.5},
        {"banned_ids": list(range(0, vocab_size, 3)), "temperature": 0.3},
        {"banned_ids": ids[:3], "logit_bias": dict.fromkeys(ids[:3], 80.0), "temperature": 0.0},
        {"allowed": words(vocab_size, 0.1), "min_p": 0.02},
        {"allowed": words(vocab_size, 0.0), "temperature": 0.0},
        every,
        {**every, "temperature": 0.0},
        {**every, "temperature": 1.4, "top_k": 50, "top_p": 0.95, "min_p": 0.001},
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [31, 1000, 4100])
def test_penalties_biases_bans_and_bits_are_the_references(vocab_size: int, dtype: torch.dtype, monkeypatch):
    """More rows than there is memory for at once; what was drawn is counted where that matters, and only there."""
    monkeypatch.setattr(kernels, "_MOST_ADJUSTED", 8)
    rows = create_rows(special_kinds(vocab_size), seed=vocab_size)
    logits = create_logits(len(rows), vocab_size, dtype, seed=vocab_size)
    before = logits.clone()
    drawing = Drawing(logits, rows)
    counts = drawing.state.counts.clone()
    token_ids = drawing.token_ids()
    assert_equal_to_reference(logits, rows, token_ids)
    assert torch.equal(logits, before)
    for place, row, token_id in zip(drawing.rows.tolist(), rows, token_ids, strict=True):
        is_penalised = row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
        counts[place, token_id] += 2 * is_penalised
    assert torch.equal(drawing.state.counts, counts)


def test_drawing_on_counts_what_was_drawn():
    """Token after token, as the reference does that is told of each."""
    kinds = [{"repetition_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.0}, {"presence_penalty": 2.0}]
    rows = create_rows(kinds)
    logits = create_logits(len(rows), 50)
    drawing = Drawing(logits, rows)
    outputs: list[list[int]] = [[], []]
    for _ in range(12):
        rows = [
            SamplingRow(row.seed, int(position), **kind, output_ids=output)
            for row, position, kind, output in zip(rows, drawing.positions, kinds, outputs, strict=True)
        ]
        token_ids = drawing.token_ids()
        assert token_ids == [draw.token_id for draw in sample(logits.cpu(), rows)]
        for output, token_id in zip(outputs, token_ids, strict=True):
            output.append(token_id)
        drawing.positions += 1
    assert len(set(outputs[0])) > 3


def test_a_row_that_is_taken_again_forgets_what_was_before():
    kinds = [{"repetition_penalty": 1.4, "output_ids": [1, 2, 2], "prompt_ids": [3]}]
    drawing = Drawing(create_logits(1, 40), create_rows(kinds))
    drawing.token_ids()
    place = int(drawing.rows[0])
    drawing.rows_state.start([start_of(place, create_rows([{"presence_penalty": 1.0, "output_ids": [7, 7, 9]}])[0])])
    expected = torch.zeros(40, dtype=torch.int32)
    expected[[7, 9]] = torch.tensor([4, 2], dtype=torch.int32)
    assert torch.equal(drawing.state.counts[place].cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_row_draws_the_same_beside_special_ones(dtype: torch.dtype):
    """Bit by bit: the general draw looks at the same numbers in the same order."""
    plain, special = create_rows(KINDS), create_rows(special_kinds(3000))
    logits = create_logits(len(plain) + len(special), 3000, dtype)
    alone = Drawing(logits[: len(plain)], plain)
    together = Drawing(logits, [*plain, *special])
    assert together.token_ids()[: len(plain)] == alone.token_ids(are_plain=True)
    assert torch.equal(together.workspace.thresholds[: len(plain)], alone.workspace.thresholds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [3, 1000, 9000])
def test_log_probabilities_are_the_references(vocab_size: int, dtype: torch.dtype):
    """Of the logits before any adjustment; of equal ones the lowest id first; none where none were asked for."""
    kinds = [{"num_logprobs": num} for num in (0, 1, 5, 20)] + [{}, {"num_logprobs": 2, "logit_bias": {0: 9.0}}]
    rows = create_rows(kinds)
    logits = create_logits(len(rows), vocab_size, dtype)
    logits[3] = logits[3].round()
    drawing = Drawing(logits, rows)
    token_ids = drawing.token_ids()
    expected = sample(logits.cpu(), rows)
    output = DrawnTokens(drawing.output.token_ids.cpu(), drawing.output.logprobs.cpu())
    for i, row in enumerate(rows):
        if row.num_logprobs is None:
            assert (output.logprobs[i] == POISON).all()
            continue
        logprob, top = output.logprobs_of(i, min(row.num_logprobs, vocab_size))
        assert token_ids[i] == expected[i].token_id
        assert logprob == pytest.approx(expected[i].logprob, abs=2e-5)
        assert [token_id for token_id, _ in top] == [token_id for token_id, _ in expected[i].top]
        assert [value for _, value in top] == pytest.approx([value for _, value in expected[i].top], abs=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [33, 9000])
def test_scores_of_allowed_ids_are_the_references(vocab_size: int, dtype: torch.dtype):
    """However unlikely they are, and in whatever blocks; the other rows' likeliest stay those of all ids."""
    last = vocab_size - 1
    scored = [(0, last), (last,), tuple(range(3, 23)), (vocab_size // 2, 1)]
    kinds = [
        {"num_logprobs": len(ids), "are_top_allowed": True, "allowed": words_of(ids, vocab_size)} for ids in scored
    ]
    kinds += [{"num_logprobs": 3, "allowed": words_of((0, last), vocab_size)}, {"num_logprobs": 20}]
    rows = create_rows(kinds)
    logits = create_logits(len(rows), vocab_size, dtype)
    logits[0, [0, last]] = -30
    drawing = Drawing(logits, rows)
    drawing.token_ids()
    expected = sample(logits.cpu(), rows)
    output = DrawnTokens(drawing.output.token_ids.cpu(), drawing.output.logprobs.cpu())
    for i, row in enumerate(rows):
        _, top = output.logprobs_of(i, row.num_logprobs)
        assert [token_id for token_id, _ in top] == [token_id for token_id, _ in expected[i].top]
        assert [value for _, value in top] == pytest.approx([value for _, value in expected[i].top], abs=2e-5)
    for i, ids in enumerate(scored):
        logprobs = logits[i].float().log_softmax(-1)[list(ids)]
        found = np.frombuffer(expected[i].scores(ids), np.float32)
        np.testing.assert_allclose(found, logprobs.cpu().numpy(), atol=1e-5)
