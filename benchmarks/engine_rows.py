"""The rows that engines are compared by: the same requests, in the same order, whoever runs them."""

import json
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import yaml

Sampling = dict[str, Any]
"""How one request's tokens are drawn beside `TEMPERATURE`, in words that `GenerationRequest` and vLLM share."""


class Run(Protocol):
    """Seconds that an engine takes for requests of these input and output lengths, all handed over at once."""

    def __call__(
        self, input_lens: list[int], output_lens: list[int], samplings: Sequence[Sampling] | None = None
    ) -> float:
        """Run them."""
        ...


TEMPERATURE = 0.6
LONG_PROMPTS = 32_000, 100_000
_PENALISED: Sampling = {"repetition_penalty": 1.05}
_WITH_LOGPROBS: Sampling = {"logprobs": 5}
_BIASED: Sampling = {"logit_bias": dict.fromkeys(range(100, 130), 2.0)}
_ALLOWED: Sampling = {"allowed_token_ids": list(range(0, 10_000, 10))}  # vLLM takes 1,024 at most
SAMPLINGS: dict[str, list[Sampling]] = {
    "penalties: 64 x 128 in, 256 out, repetition_penalty 1.05": [_PENALISED],
    "logprobs: 64 x 128 in, 256 out, 5 of the likeliest": [_WITH_LOGPROBS],
    "kinds: 64 x 128 in, 256 out, half plain, half of every kind": [
        {}, _PENALISED, {}, _WITH_LOGPROBS, {}, _BIASED, {}, _ALLOWED,
    ],
}  # fmt: skip
MAX_TOKEN_ID = 10_000
NUM_LONG = 384
"""Requests of the row of 1,000 tokens in and out, unless told."""
MODELS = Path(__file__).parent / "models"
"""Configurations of known models, for random weights."""


@dataclass(frozen=True)
class Row:
    """A row and the function that measures it: it returns what to print."""

    name: str
    measure: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class LeastReads:
    """Bytes that decoding cannot do without reading, so that a row which is too good to be true shows.

    Attributes:
        weights: a step.
        slot: a token of context and step.
        state: a sequence and step, what is written back included.
    """

    weights: int
    slot: int
    state: int = 0

    def gb_s(self, input_lens: list[int], output_lens: list[int], seconds: float) -> float:
        """Gigabytes a second of requests that all decode together: no more than what the device's memory gives."""
        lens = zip(input_lens, output_lens, strict=True)
        contexts = sum(num_in * num_out + num_out**2 / 2 for num_in, num_out in lens)
        num_bytes = self.weights * max(output_lens) + self.slot * contexts + self.state * sum(output_lens)
        return round(num_bytes / seconds / 1e9, 1)


def comparable_rows(
    run: Run, scale: int = 1, reads: LeastReads | None = None, num_long: int = NUM_LONG
) -> Iterator[Row]:
    """Rows that any engine can run.

    Args:
        scale: divides numbers of requests and of tokens, to try the benchmark itself.
        reads: of this engine, to go into the rows.
        num_long: requests of the row of 1,000 tokens in and out.
    """

    def read(input_lens: list[int], output_lens: list[int], seconds: float) -> dict[str, float]:
        return {"read_gb_s": reads.gb_s(input_lens, output_lens, seconds)} if reads else {}

    def throughput(input_lens: list[int], output_lens: list[int]) -> dict[str, Any]:
        seconds = run(input_lens, output_lens)
        row = {"s": round(seconds, 3), "output_tok_s": round(sum(output_lens) / seconds)}
        return {**row, **read(input_lens, output_lens, seconds)}

    def mixed() -> dict[str, Any]:
        rng = random.Random(0)
        lens = [rng.randint(100 // scale, 1024 // scale) for _ in range(2 * 256 // scale)]
        return throughput(lens[: len(lens) // 2], lens[len(lens) // 2 :])

    def decode(batch: int) -> dict[str, Any]:
        num_steps = 256 // scale
        prefill = run([128] * batch, [1] * batch)
        seconds = run([128] * batch, [1 + num_steps] * batch) - prefill
        row = {"ms_per_step": round(seconds / num_steps * 1e3, 3)}
        return {**row, **read([128] * batch, [num_steps] * batch, seconds)}

    def prefill_one() -> dict[str, Any]:
        run([1024 // scale], [1])
        return {"ms": round(run([1024 // scale], [1]) * 1e3, 1)}

    def prefill_many() -> dict[str, Any]:
        num_requests, num_tokens = 64 // scale, 2048 // scale
        seconds = run([num_tokens] * num_requests, [1] * num_requests)
        return {"s": round(seconds, 3), "input_tok_s": round(num_requests * num_tokens / seconds)}

    def drawn(samplings: Sequence[Sampling]) -> dict[str, Any]:
        num_requests, num_out = 64 // scale, 256 // scale
        every = [samplings[i % len(samplings)] for i in range(num_requests)]
        run([128] * num_requests, [8] * num_requests, every)
        seconds = run([128] * num_requests, [num_out] * num_requests, every)
        return {"s": round(seconds, 3), "output_tok_s": round(num_requests * num_out / seconds)}

    run([100] * 8, [16] * 8)
    yield Row("mixed: 256 requests, 100-1024 in, 100-1024 out", mixed)
    lens = [1000 // scale] * (num_long // scale)
    yield Row(f"1000/1000 x{num_long}", lambda: throughput(lens, lens))
    for batch in (1, 8, 16, 32, 64, 128, 256):
        yield Row(f"decode batch {batch}", lambda batch=batch: decode(max(batch // scale, 1)))  # type: ignore[misc]
    yield Row("prefill 1x1024", prefill_one)
    yield Row("prefill 64x2048", prefill_many)
    for name, samplings in SAMPLINGS.items():
        yield Row(name, lambda samplings=samplings: drawn(samplings))  # type: ignore[misc]


def long_rows(run: Run, max_seq_len: int, scale: int = 1) -> Iterator[Row]:
    """One long prompt by itself, for each length that the model has room for."""

    def prefill(num_tokens: int) -> dict[str, Any]:
        run([num_tokens], [1])
        seconds = min(run([num_tokens], [1]) for _ in range(2))
        return {"ms": round(seconds * 1e3, 1), "input_tok_s": round(num_tokens / seconds)}

    for num_tokens in LONG_PROMPTS:
        if num_tokens < max_seq_len:
            yield Row(f"prefill 1x{num_tokens}", lambda n=num_tokens // scale: prefill(n))  # type: ignore[misc]


def measure(rows: Iterator[Row], common: dict[str, Any], out: TextIO | None, wanted: list[str] | None = None) -> bool:
    """Measure and print each row at once, one JSON line each; False if any failed.

    Args:
        common: goes into every line.
        out: file to write the lines to as well.
        wanted: rows whose names begin with one of these; None for all.
    """
    all_well = True
    for row in rows:
        if wanted is not None and not row.name.startswith(tuple(wanted)):
            continue
        try:
            emit({**common, "name": row.name, **row.measure()}, out)
        except Exception as error:  # noqa: BLE001  # a row that fails is no reason to lose the others
            traceback.print_exc()
            emit({**common, "name": row.name, "error": f"{type(error).__name__}: {error}"}, out)
            all_well = False
    return all_well


def emit(line: dict[str, Any], out: TextIO | None) -> None:
    """Print a line, and append it to `out`."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        out.write(text + "\n")
        out.flush()


def settings(items: list[str]) -> dict[str, Any]:
    """Arguments of an engine, written KEY=VALUE with a value in YAML."""
    return {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in items)}


def random_prompt(rng: random.Random, num_tokens: int, vocab_size: int = MAX_TOKEN_ID) -> tuple[int, ...]:
    """Token ids of a prompt that nobody has seen."""
    return tuple(rng.randrange(min(vocab_size, MAX_TOKEN_ID)) for _ in range(num_tokens))


def seconds_since_process_start() -> float:
    """Age of this process in seconds, from the kernel; what `import` took is in it."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / 100


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def timed(call: Callable[[], object]) -> float:
    """Seconds that `call` takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
