"""Ours and vLLM's rows side by side, with the targets.

python -m benchmarks.engine_table OURS.jsonl VLLM.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple


class Target(NamedTuple):
    """What a row should reach, by model shape.

    Attributes:
        field: of the row.
        large, small: ratio to vLLM's figure (or the figure itself where `is_ratio` is False) for the 8B and 0.6B shape.
        is_more_better: whether the target is a floor.
    """

    field: str
    large: float
    small: float
    is_more_better: bool
    is_ratio: bool = True


TARGETS = {
    "mixed: 256 requests, 100-1024 in, 100-1024 out": Target("output_tok_s", 1.10, 1.25, True),
    "1000/1000 x384": Target("output_tok_s", 1.10, 1.15, True),
    "penalties: 64 x 128 in, 256 out, repetition_penalty 1.05": Target("output_tok_s", 1.10, 1.10, True),
    "logprobs: 64 x 128 in, 256 out, 5 of the likeliest": Target("output_tok_s", 1.05, 1.05, True),
    "kinds: 64 x 128 in, 256 out, half plain, half of every kind": Target("output_tok_s", 1.05, 1.05, True),
    "prefill 1x32000": Target("ms", 1.0, 1.0, False),
    "prefill 1x100000": Target("ms", 1.0, 1.0, False),
    "decode batch 1": Target("ms_per_step", 0.87, 0.45, False),
    "decode batch 8": Target("ms_per_step", 0.90, 0.60, False),
    "decode batch 16": Target("ms_per_step", 0.90, 0.60, False),
    "decode batch 32": Target("ms_per_step", 0.90, 0.60, False),
    "decode batch 64": Target("ms_per_step", 0.90, 0.60, False),
    "decode batch 128": Target("ms_per_step", 0.95, 0.80, False),
    "decode batch 256": Target("ms_per_step", 0.95, 0.80, False),
    "prefill 1x1024": Target("ms", 1.0, 1.0, False),
    "prefill 64x2048": Target("input_tok_s", 1.0, 1.0, True),
    "startup": Target("s", 30, 20, False, is_ratio=False),
    "gap: 64 streams while 8000 tokens arrive": Target("ratio", 3, 3, False, is_ratio=False),
    "prefix: 256 x 2000 in, 90% shared, 64 out": Target("ratio", 2.5, 2.5, True, is_ratio=False),
    "fp8: mixed, 8-bit weights": Target("ratio", 1.35, 1.35, True, is_ratio=False),
    "fp8: mixed, 8-bit weights and cache": Target("ratio", 1.35, 1.35, True, is_ratio=False),
    "deterministic: 256 alone and together, 64 out": Target("ratio", 1.3, 1.3, False, is_ratio=False),
}
TARGETS_OF = {
    "llama-3.1-8b-fp8": {
        "mixed: 256 requests, 100-1024 in, 100-1024 out": Target("output_tok_s", 1.15, 1.15, True),
        "1000/1000 x384": Target("output_tok_s", 16_500, 16_500, True, is_ratio=False),
    },
    "qwen3-30b-a3b": {
        "mixed: 256 requests, 100-1024 in, 100-1024 out": Target("output_tok_s", 1.25, 1.25, True),
        "decode batch 1": Target("ms_per_step", 0.55, 0.55, False),
        "decode batch 16": Target("ms_per_step", 0.80, 0.80, False),
        "decode batch 256": Target("ms_per_step", 0.85, 0.85, False),
        "prefill 64x2048": Target("input_tok_s", 1.10, 1.10, True),
    },
}
"""Targets of single shapes and formats, in place of those above, by the lines' names for them."""
_SMALL_MODELS = ("qwen3-0.6b",)


def table(ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """Markdown, one table a model."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in ours):
        peer_rows = {row["name"]: row for row in peers if row["model"] == model}
        peer_name = next((row["engine"] for row in peer_rows.values()), "vLLM")
        lines += [f"| {model} | Rayline | {peer_name} | ratio | target | |", "|---|---|---|---|---|---|"]
        lines += [
            _line(row, peer_rows.get(row["name"]), is_small=model in _SMALL_MODELS)
            for row in ours
            if row["model"] == model and row["name"] in TARGETS
        ]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any], peer: dict[str, Any] | None, *, is_small: bool) -> str:
    target = TARGETS_OF.get(row["model"], {}).get(row["name"]) or TARGETS[row["name"]]
    goal = target.small if is_small else target.large
    sign = "≥" if target.is_more_better else "≤"
    if target.field not in row:
        return f"| {row['name']} | failed | | | {sign} {goal} | **missed** |"
    own = row[target.field]
    theirs = peer.get(target.field) if peer is not None else None
    ratio = own / theirs if theirs else None
    reached = ratio if target.is_ratio else own
    if reached is None:
        verdict = ""
    else:
        verdict = "met" if (reached >= goal if target.is_more_better else reached <= goal) else "**missed**"
    of_what = " of vLLM's" if target.is_ratio else ""
    return (
        f"| {row['name']}, {target.field} | {own:,} | {'' if theirs is None else f'{theirs:,}'} "
        f"| {'' if ratio is None else f'{ratio:.2f}'} | {sign} {goal}{of_what} | {verdict} |"
    )


def main() -> None:
    """Read JSON lines, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", help="lines of benchmarks.engine")
    parser.add_argument("vllm", help="lines of benchmarks.engine_vllm")
    options = parser.parse_args()
    ours, peers = (
        [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
        for path in (options.ours, options.vllm)
    )
    print(table(ours, peers))


if __name__ == "__main__":
    main()
