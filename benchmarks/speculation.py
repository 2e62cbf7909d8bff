"""Guessing from the prompt, on and off, on the demo model: text that repeats itself and text that does not.

    python -m benchmarks.speculation [--requests 1 8 32] [--guesses 8] [--repeats 5] [--set deterministic=true]
    python -m benchmarks.speculation --shape benchmarks/models/llama-3.1-8b

On the GPU where there is one, else on the CPU; greedy. Repeating: a conversation in which a question that was answered
is asked again. Not repeating: short questions of many kinds, and a random prompt sampled at temperature 1. The two
engines take turns, and ratios are medians over the turns. One JSON line a row. `--shape` runs the random prompts alone,
on random weights of another model's shape.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from demo.tasks import TASKS, held_out_cases
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer

DEMO = Path(__file__).parent.parent / "configs" / "demo"


@dataclass(frozen=True)
class Turn:
    """One run of a workload."""

    tokens_per_s: float
    token_ids: list[tuple[int, ...]]
    proposed: int
    accepted: int


def asked_again(tokenizer: HFTokenizer, num: int) -> list[GenerationRequest]:
    """Tables and countings, each with its answer already in the conversation."""
    requests = []
    for index in range(num):
        case = held_out_cases(("table", "count_by", "count_down")[index % 3], index + 1, seed=1)[-1]
        question = {"role": "user", "content": case.prompt}
        messages = [question, {"role": "assistant", "content": case.answer}, question]
        prompt = tuple(tokenizer.apply_chat_template(messages))
        requests.append(GenerationRequest(prompt_token_ids=prompt, temperature=0, max_new_tokens=256))
    return requests


def asked_once(tokenizer: HFTokenizer, num: int) -> list[GenerationRequest]:
    """Short questions, four for each of `num`, since their answers are short."""
    names = [name for name, task in TASKS.items() if not task.is_long]
    cases = [held_out_cases(names[i % len(names)], i + 1, seed=1)[-1] for i in range(4 * num)]
    prompts = [tuple(tokenizer.apply_chat_template([{"role": "user", "content": case.prompt}])) for case in cases]
    return [GenerationRequest(prompt_token_ids=prompt, temperature=0, max_new_tokens=256) for prompt in prompts]


def babble(tokenizer: HFTokenizer, num: int) -> list[GenerationRequest]:
    """128 tokens behind 64 random ones."""
    rng = random.Random(0)
    return [
        GenerationRequest(
            prompt_token_ids=tuple(rng.randrange(10, tokenizer.vocab_size) for _ in range(64)),
            seed=seed, max_new_tokens=128, ignore_eos=True,
        )
        for seed in range(num)
    ]  # fmt: skip


WORKLOADS: dict[str, Callable[[HFTokenizer, int], list[GenerationRequest]]] = {
    "repeats: asked again": asked_again,
    "does not repeat: short answers": asked_once,
    "does not repeat: sampled babble": babble,
}


def run(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> Turn:
    """Run requests to their end, all at once."""
    before = engine.stats()
    start = time.perf_counter()
    results = engine.generate(requests, progress=False)
    elapsed_s = time.perf_counter() - start
    after = engine.stats()
    token_ids = [result.token_ids for result in results]
    return Turn(
        sum(map(len, token_ids)) / elapsed_s,
        token_ids,
        after.num_proposed_tokens - before.num_proposed_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--guesses", type=int, default=8, help="num_speculative_tokens")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns of each engine")
    parser.add_argument("--shape", type=Path, help="directory of a config.json, instead of the demo model")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of EngineConfig")
    options = parser.parse_args()
    fields = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in options.set)}
    engines = []
    for num in (0, options.guesses):
        config = EngineConfig(
            num_speculative_tokens=num, enable_prefix_caching=False, max_batch_size=128, num_pages=8192, **fields
        )
        torch.manual_seed(0)
        engines.append(
            ContinuousBatchingEngine.from_pretrained(
                options.shape or DEMO,
                random_weights=options.shape is not None,
                with_tokenizer=False,
                progress=False,
                config=config,
            )
        )
    plain, guessing = engines
    tokenizer = HFTokenizer.from_pretrained(DEMO)
    for name in [list(WORKLOADS)[-1]] if options.shape else WORKLOADS:
        make_requests = WORKLOADS[name]
        for num in options.requests:
            requests = make_requests(tokenizer, num)
            run(plain, requests), run(guessing, requests)
            turns = [(run(plain, requests), run(guessing, requests)) for _ in range(options.repeats)]
            last = turns[-1][1]
            row = {
                "workload": name,
                "requests": len(requests),
                "device": plain.model.device.type,
                "plain, tokens/s": round(statistics.median(off.tokens_per_s for off, _ in turns)),
                "guessing, tokens/s": round(statistics.median(on.tokens_per_s for _, on in turns)),
                "ratio": round(statistics.median(on.tokens_per_s / off.tokens_per_s for off, on in turns), 2),
                "guesses accepted": f"{last.accepted}/{last.proposed}",
                "share of equal outputs": statistics.mean(
                    ours == theirs
                    for off, on in turns
                    for ours, theirs in zip(on.token_ids, off.token_ids, strict=True)
                ),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
