"""Request traces for `benchmarks.routing_sim`, read from files in their publishers' formats.

- **Mooncake** (JSON lines; Qin et al., FAST 2025; https://github.com/kvcache-ai/Mooncake, `FAST25-release/traces`):
  `timestamp` in ms, `input_length`, `output_length`, and `hash_ids`, one for each 512 tokens of the prompt begun; equal
  ids are equal beginnings.
- **Azure** (CSV; Patel et al., *Splitwise*, ISCA 2024; https://github.com/Azure/AzurePublicDataset,
  `AzureLLMInferenceTrace_conv.csv`): `TIMESTAMP,ContextTokens,GeneratedTokens`, without a word on what prompts share.
"""

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hash ids stands for."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        arrival_s: since the trace's first request.
        num_prompt_tokens: at least 1.
        num_output_tokens: at least 1.
        block_hashes: of the prompt's full blocks of `BLOCK_TOKENS`; empty where nothing is known of its content.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a trace, in order of arrival: Mooncake's where the name ends in .jsonl, Azure's where it ends in .csv.

    Raises:
        ValueError: the file is in neither format; the message names the file and what is wrong.
        OSError: it cannot be read.
    """
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    if path.suffix not in readers:
        raise ValueError(f"{path}: a trace ends in .jsonl (Mooncake's format) or .csv (Azure's)")
    try:
        requests = sorted(readers[path.suffix](path), key=lambda request: request.arrival_s)
    except (KeyError, TypeError, ValueError) as error:
        formats = "{timestamp, input_length, output_length, hash_ids} or TIMESTAMP,ContextTokens,GeneratedTokens"
        raise ValueError(f"{path}: not a trace with {formats}: {error!r}") from error
    if not requests:
        raise ValueError(f"{path}: the trace is empty")
    start = requests[0].arrival_s
    return [
        TraceRequest(r.arrival_s - start, max(r.num_prompt_tokens, 1), max(r.num_output_tokens, 1), r.block_hashes)
        for r in requests
    ]


def _read_mooncake(path: Path) -> list[TraceRequest]:
    requests = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        num_tokens = int(row["input_length"])
        full_blocks = tuple(row["hash_ids"][: num_tokens // BLOCK_TOKENS])
        requests.append(TraceRequest(row["timestamp"] / 1000, num_tokens, int(row["output_length"]), full_blocks))
    return requests


def _read_azure(path: Path) -> list[TraceRequest]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            TraceRequest(
                datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
            for row in csv.DictReader(file)
        ]
