"""The engine beside transformers on this machine's CPU, on the same weights, prompts and lengths.

    python -m benchmarks.cpu [--models demo random-100m] [--repeats 3]

Contenders take turns, and ratios are medians over the turns, so that a drifting machine hurts all alike.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

# (input, output) tokens of the first 32 requests of the Azure LLM inference trace 2023, conversation (CC-BY 4.0; Patel
# et al., Splitwise, ISCA 2024).
AZURE_LENS = (
    (374, 44), (396, 109), (879, 55), (91, 16), (91, 16), (381, 84), (1313, 142), (388, 84),
    (242, 14), (209, 152), (394, 124), (394, 59), (1315, 174), (2221, 15), (389, 90), (415, 106),
    (120, 12), (369, 74), (206, 162), (1353, 142), (197, 152), (181, 154), (388, 54), (4085, 62),
    (2584, 170), (203, 147), (126, 194), (389, 87), (2548, 116), (91, 16), (4081, 74), (181, 123),
)  # fmt: skip
DEMO = Path(__file__).parent.parent / "configs" / "demo"


@dataclass(frozen=True)
class Workload:
    """Prompts of token ids, and how many tokens to generate for each."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_output_tokens(self) -> int:
        """Tokens that count."""
        return sum(self.output_lens)


def make_workloads(vocab_size: int) -> list[Workload]:
    """32 requests of evenly mixed lengths, 32 of a real service's with prompts cut to a quarter, and one alone."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, min(vocab_size, 10_000)) for _ in range(length)]

    mixed = Workload(
        "32 requests, 16-256 in and out",
        [prompt(rng.randint(16, 256)) for _ in range(32)],
        [rng.randint(16, 256) for _ in range(32)],
    )
    azure = Workload(
        "32 requests of the Azure trace, inputs / 4",
        [prompt(num_in // 4) for num_in, _ in AZURE_LENS],
        [num_out for _, num_out in AZURE_LENS],
    )
    return [mixed, azure, Workload("1 request, 64 in, 128 out", [prompt(64)], [128])]


def run_rayline(engine: ContinuousBatchingEngine, workload: Workload) -> int:
    """Our engine; returns the number of useful tokens."""
    requests = [
        GenerationRequest(prompt_token_ids=tuple(prompt), max_new_tokens=num_out, temperature=0, ignore_eos=True)
        for prompt, num_out in zip(workload.prompts, workload.output_lens, strict=True)
    ]
    return sum(len(result.token_ids) for result in engine.generate(requests, progress=False))


def run_static(model: LlamaForCausalLM, workload: Workload) -> int:
    """transformers' `generate` on one left-padded batch: everybody runs until the longest is done."""
    longest = max(map(len, workload.prompts))
    input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in workload.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in workload.prompts])
    num_steps = max(workload.output_lens)
    output = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=num_steps,
        min_new_tokens=num_steps,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert output.shape[1] == longest + num_steps
    return workload.num_output_tokens


def run_generate_batch(model: LlamaForCausalLM, workload: Workload) -> int:
    """transformers' continuous batching (what `generate_batch` runs), with each request's own length."""
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(workload.output_lens)
    )
    num_tokens = 0
    with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=10) as manager:
        for prompt, num_out in zip(workload.prompts, workload.output_lens, strict=True):
            manager.add_request(prompt, max_new_tokens=num_out)
        pending = len(workload.prompts)
        while pending:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_tokens += len(result.generated_tokens)
                pending -= 1
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' generation thread ended early")
    return num_tokens


def random_100m(directory: Path) -> Path:
    """A Llama checkpoint of about 100 million random parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def measure(model_name: str, directory: Path, repeats: int) -> list[dict[str, object]]:
    """Time every contender on every workload; one row a pair."""
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    engine = ContinuousBatchingEngine.from_pretrained(
        directory,
        device="cpu",
        with_tokenizer=False,
        progress=False,
        config=EngineConfig(enable_prefix_caching=False),
    )
    contenders: dict[str, Callable[[Workload], int]] = {
        "rayline": lambda workload: run_rayline(engine, workload),
        "transformers generate": lambda workload: run_static(reference, workload),
        "transformers generate_batch": lambda workload: run_generate_batch(reference, workload),
    }
    rows = []
    *batches, alone = make_workloads(reference.config.vocab_size)
    for run in contenders.values():
        run(alone)
    for workload in (*batches, alone):
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, run in contenders.items():
                gc.collect()
                start = time.perf_counter()
                num_tokens = run(workload)
                speeds[name].append(num_tokens / (time.perf_counter() - start))
                assert num_tokens == workload.num_output_tokens, f"{name} made {num_tokens} tokens"
        rows.append(_row(model_name, workload, speeds))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _row(model_name: str, workload: Workload, speeds: dict[str, list[float]]) -> dict[str, object]:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best_peer = max((name for name in medians if name != "rayline"), key=medians.__getitem__)
    ratios = [ours / theirs for ours, theirs in zip(speeds["rayline"], speeds[best_peer], strict=True)]
    return {
        "model": model_name,
        "workload": workload.name,
        **{f"{name}, tokens/s": round(value, 1) for name, value in medians.items()},
        "best peer": best_peer,
        "ratio": round(statistics.median(ratios), 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["demo", "random-100m"], default=["demo", "random-100m"])
    parser.add_argument("--repeats", type=int, default=3, help="counted turns of each contender")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            directory = DEMO if name == "demo" else random_100m(Path(scratch))
            rows += measure(name, directory, options.repeats)
    table = Table(
        title=f"Output tokens/s on {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, float32"
    )
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
