"""What a load test sends and when: lengths, arrivals, traces. Nothing here knows a server.

Traces, in their publishers' formats:

- **mooncake** (JSON lines; Qin et al., *Mooncake*, FAST 2025; https://github.com/kvcache-ai/Mooncake,
  `FAST25-release/traces`): `timestamp` in ms, `input_length`, `output_length`, and `hash_ids`, one for each 512 tokens
  of the prompt begun; equal ids are equal tokens.
- **azure** (CSV; Patel et al., *Splitwise*, ISCA 2024; https://github.com/Azure/AzurePublicDataset):
  `TIMESTAMP,ContextTokens,GeneratedTokens`, without a word on what prompts share.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash ids stands for."""


class TraceFormat(StrEnum):
    """Format of the trace."""

    MOONCAKE = "mooncake"
    AZURE = "azure"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send.

    Attributes:
        index: its place in the workload.
        num_input_tokens: length of the prompt, at least 1.
        num_output_tokens: `max_tokens`, at least 1.
        arrival_s: when it is due, in seconds from the start; None in a closed loop.
        block_ids: ids of the prompt's blocks of `BLOCK_TOKENS`, the last one perhaps not full; empty for a prompt that
            shares nothing.
    """

    index: int
    num_input_tokens: int
    num_output_tokens: int
    arrival_s: float | None = None
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Whole numbers from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> "LengthRange":
        """Read `128` or `100-1024`.

        Raises:
            ValueError: the text has another form; the message names `option`.
        """
        low, _, high = text.partition("-")
        try:
            parsed = cls(int(low), int(high or low))
        except ValueError:
            parsed = cls(0, 0)
        if not 1 <= parsed.low <= parsed.high:
            raise ValueError(f"{option} {text!r}: give a number of tokens of 1 or more, or a range such as 100-1024")
        return parsed

    def draw(self, num: int, rng: np.random.Generator) -> list[int]:
        """Draw `num` numbers, all equally likely."""
        return [int(length) for length in rng.integers(self.low, self.high, size=num, endpoint=True)]


def random_workload(num_requests: int, inputs: LengthRange, outputs: LengthRange, seed: int) -> list[PlannedRequest]:
    """Requests whose lengths are drawn uniformly, without arrivals."""
    rng = np.random.default_rng([seed, 0])
    lengths = zip(inputs.draw(num_requests, rng), outputs.draw(num_requests, rng), strict=True)
    return [PlannedRequest(index, num_in, num_out) for index, (num_in, num_out) in enumerate(lengths)]


def with_arrivals(requests: list[PlannedRequest], rate: float, burstiness: float, seed: int) -> list[PlannedRequest]:
    """The same requests, due at `rate` a second with gamma-distributed gaps, as in vLLM's `get_request`.

    The gaps are scaled so that the last request is due at `len(requests) / rate`, which takes out the 1 or 2 % by which
    drawn sums differ.

    Args:
        requests: the requests.
        rate: requests a second.
        burstiness: shape of the gamma distribution: 1 is a Poisson process, less is more bursty, more is more even.
        seed: seed of the draws.
    """
    gaps = np.random.default_rng([seed, 1]).gamma(burstiness, 1 / (rate * burstiness), size=len(requests))
    arrivals = np.cumsum(gaps)
    arrivals *= len(requests) / rate / arrivals[-1]
    return [replace(request, arrival_s=float(due)) for request, due in zip(requests, arrivals, strict=True)]


def trace_workload(
    path: Path,
    trace_format: TraceFormat,
    *,
    speed: float = 1.0,
    num_requests: int | None = None,
    max_input_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> list[PlannedRequest]:
    """Requests of a trace, due at the intervals at which they arrived, the first one at once.

    Args:
        path: the file.
        trace_format: format of the file.
        speed: 2 replays it in half the time.
        num_requests: only the first ones.
        max_input_tokens: longer prompts lose their ends, so what they share stays shared.
        max_output_tokens: longer answers end there.

    Raises:
        ValueError: the file is not such a trace; the message names it and the line.
        OSError: it cannot be read.
    """
    requests: list[PlannedRequest] = []
    with path.open(encoding="utf-8", newline="") as file:
        read = _read_mooncake if trace_format is TraceFormat.MOONCAKE else _read_azure
        try:
            requests.extend(islice(read(file), num_requests))
        except (KeyError, TypeError, ValueError) as error:
            request = f"request {len(requests) + 1}"
            raise ValueError(f"{path}: {request} does not read as --trace-format {trace_format}: {error!r}") from error
    if not requests:
        raise ValueError(f"{path}: the trace is empty")
    requests.sort(key=lambda request: request.arrival_s or 0.0)
    start = requests[0].arrival_s or 0.0
    return [
        replace(
            request,
            index=index,
            arrival_s=((request.arrival_s or 0.0) - start) / speed,
            num_input_tokens=_clip(request.num_input_tokens, max_input_tokens),
            num_output_tokens=_clip(request.num_output_tokens, max_output_tokens),
        )
        for index, request in enumerate(requests)
    ]


def _read_mooncake(lines: Iterable[str]) -> Iterator[PlannedRequest]:
    for index, line in enumerate(lines):
        row = json.loads(line)
        blocks = tuple(int(block) for block in row["hash_ids"])
        num_input = int(row["input_length"])
        if len(blocks) * BLOCK_TOKENS < num_input:
            raise ValueError(f"{len(blocks)} hash_ids are too few for {num_input} tokens")
        yield PlannedRequest(index, num_input, int(row["output_length"]), float(row["timestamp"]) / 1e3, blocks)


def _read_azure(lines: Iterable[str]) -> Iterator[PlannedRequest]:
    for index, row in enumerate(csv.DictReader(lines)):
        # The file has seven digits of a second's fraction, Python reads six.
        due = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        yield PlannedRequest(index, int(row["ContextTokens"]), int(row["GeneratedTokens"]), due)


def _clip(num_tokens: int, limit: int | None) -> int:
    return max(num_tokens if limit is None else min(num_tokens, limit), 1)
