"""What groups of layers save: memory that one sequence holds, beside what it would hold if every layer kept everything.

    python -m benchmarks.page_groups [--tokens 32768] [--step 8192]

No model runs. One JSON line a model: groups, layers in a page, and the share of the memory that is left, at most while
the prompt is read and while the sequence decodes.
"""

import argparse
import json

from llm.core.page_groups import group_layers, layers_per_page
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import GenerationRequest

_PAGE_SIZE = 16
_NUM_DECODES = 64
WINDOWS: dict[str, list[int | None]] = {
    "gpt-oss-20b": [128, None] * 12,
    "gemma-3-270m": ([512] * 5 + [None]) * 3,
    "gemma-3-27b": ([1024] * 5 + [None]) * 10 + [1024] * 2,
    "ministral-8b": ([None] + [32768] * 3) * 9,
    "mistral-7b-v0.1": [4096] * 32,
    "llama-3.1-8b": [None] * 32,
}
"""By the models' configurations: the window of each layer, None where it sees everything."""


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of the prompt")
    parser.add_argument("--step", type=int, default=8192, help="token budget of a step")
    options = parser.parse_args()
    for model, windows in WINDOWS.items():
        groups = group_layers(windows)
        whole = len(windows) * (options.tokens + _NUM_DECODES)
        pool = SlotPool(len(groups) * (options.tokens // _PAGE_SIZE + 100), _PAGE_SIZE)
        scheduler = Scheduler(
            pool, max_batch_size=1, max_tokens_per_step=options.step, max_seq_len=options.tokens + 2 * _NUM_DECODES,
            windows=[group.window for group in groups], enable_prefix_caching=False,
        )  # fmt: skip
        prompt = tuple(range(options.tokens))
        request = GenerationRequest(prompt_token_ids=prompt, max_new_tokens=_NUM_DECODES, ignore_eos=True)
        scheduler.add(Sequence(request, prompt, frozenset(), _PAGE_SIZE))
        most = last = 0
        while scheduler.has_pending_work:
            plan = scheduler.schedule()
            last = pool.num_used
            most = max(most, last)
            scheduler.apply(plan, [1] * sum(part.num_draws for part in plan.parts))
        shares = {name: pages * _PAGE_SIZE * layers_per_page(groups) / whole for name, pages in
                  (("while read", most), ("while decoding", last))}  # fmt: skip
        print(
            json.dumps(
                {"model": model, "groups": len(groups), "layers a page": layers_per_page(groups)}
                | {name: round(share, 3) for name, share in shares.items()}
            )
        )


if __name__ == "__main__":
    main()
