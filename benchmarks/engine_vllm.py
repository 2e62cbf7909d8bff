"""vLLM's offline engine on the rows of `benchmarks.engine`: random weights, token ids, the same lengths.

python -m benchmarks.engine_vllm --model benchmarks/models/llama-3.1-8b [--set quantization=fp8 kv_cache_dtype=fp8]
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.engine_adapters import adapter_rows, add_options, write_adapters
from benchmarks.engine_rows import (
    LONG_PROMPTS,
    TEMPERATURE,
    Sampling,
    comparable_rows,
    emit,
    long_rows,
    measure,
    random_prompt,
    seconds_since_process_start,
    settings,
)


def main() -> None:
    """Measure, print, and exit with 1 if a row failed or vLLM is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a config.json")
    parser.add_argument("--rows", nargs="+", help="only rows whose names begin so")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further arguments of vLLM's LLM")
    parser.add_argument("--name", help="what the lines call the model; its directory's name if left out")
    parser.add_argument("--out", help="file to append the JSON lines to")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try the benchmark itself")
    add_options(parser)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm  # not a dependency
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        sys.exit(f"vLLM cannot be imported ({error}); install it beside Rayline to run this side of the comparison")
    config = json.loads((Path(options.model) / "config.json").read_text())
    adapters = {"enable_lora": True, "max_loras": options.adapters, "max_lora_rank": options.adapter_rank}
    max_model_len = min(max(LONG_PROMPTS) + 64, config["max_position_embeddings"])
    llm = vllm.LLM(
        options.model, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=max_model_len,
        gpu_memory_utilization=0.9, enable_prefix_caching=False,
        **(adapters if options.adapters else {}), **settings(options.set),
    )  # fmt: skip
    rng = random.Random(0)
    written: list[Path] = []

    def run(
        input_lens: list[int], output_lens: list[int], samplings: Sequence[Sampling] | None = None,
        chosen: Sequence[int | None] | None = None,
    ) -> float:  # fmt: skip
        params = [
            vllm.SamplingParams(
                temperature=TEMPERATURE, ignore_eos=True, max_tokens=length, detokenize=False, **sampling
            )
            for length, sampling in zip(output_lens, samplings or [{}] * len(output_lens), strict=True)
        ]
        prompts = [{"prompt_token_ids": list(random_prompt(rng, length))} for length in input_lens]
        start = time.perf_counter()
        requests = None
        if chosen is not None:
            requests = [None if i is None else LoRARequest(f"adapter-{i}", i + 1, str(written[i])) for i in chosen]
        llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
        return time.perf_counter() - start

    common = {"engine": f"vllm {vllm.__version__}", "model": options.name or Path(options.model).name}
    with ExitStack() as stack:
        out = stack.enter_context(open(options.out, "a")) if options.out else None
        run([16], [1])
        emit({**common, "name": "startup", "s": round(seconds_since_process_start(), 1)}, out)
        llm.apply_model(draw_weights)
        if options.adapters:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            written += write_adapters(options.model, directory, options.adapters, options.adapter_rank)
            rows = adapter_rows(
                lambda lens, outs, chosen: run(lens, outs, None, chosen), options.adapters, options.adapter_rank,
                options.scale,
            )  # fmt: skip
            sys.exit(0 if measure(rows, common, out, options.rows) else 1)
        all_well = measure(comparable_rows(run, options.scale, None, options.num_long), common, out, options.rows)
        all_well &= measure(long_rows(run, max_model_len, options.scale), common, out, options.rows)
    sys.exit(0 if all_well else 1)


def draw_weights(model: torch.nn.Module) -> None:
    """Draw 16-bit weights as Rayline draws its random ones, by themselves in each layer.

    vLLM's dummy weights are the same in every layer. That draws the hidden states of all rows together, so they go to
    the same few experts: a step of 16 rows then reads fewer of them than it would of a trained model.
    """
    for weight in model.parameters():
        if weight.dtype.is_floating_point and weight.dtype.itemsize == 2:
            weight.data.normal_(0, 0.02) if weight.dim() > 1 else weight.data.fill_(1)


if __name__ == "__main__":
    main()
