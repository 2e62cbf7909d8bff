"""The engine's rows: throughput, milliseconds a step, prefill, start-up, and the gap that a long prompt makes.

    python -m benchmarks.engine --model benchmarks/models/llama-3.1-8b --random-weights [--rows mixed decode gap]
    python -m benchmarks.engine --model DIR --profile [1 64 256]

One JSON line a row. `benchmarks.engine_vllm` runs the comparable rows with vLLM, `benchmarks.engine_table` sets the two
side by side; `make bench-gpu` does all three.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.engine_adapters import adapter_refs, adapter_rows, add_options, rotation_row, write_adapters
from benchmarks.engine_profile import profile
from benchmarks.engine_rows import (
    LONG_PROMPTS,
    TEMPERATURE,
    LeastReads,
    Row,
    Sampling,
    comparable_rows,
    emit,
    long_rows,
    measure,
    percentile,
    random_prompt,
    seconds_since_process_start,
    settings,
    timed,
)
from llm.config import EngineConfig
from llm.models.experts import ExpertProjections
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.engine_setup import EngineSetup
from llm.serving.schemas import AdapterRef, GenerationRequest


class Bench:
    """Engines of one model, one at a time.

    Args:
        options: the command line.
        engine_options: fields of `EngineConfig` given there.
    """

    def __init__(self, options: argparse.Namespace, engine_options: dict[str, Any]) -> None:
        self._options = options
        self._engine_options = engine_options
        self._rng = random.Random(0)
        self.engine: ContinuousBatchingEngine

    def start(self, **config: Any) -> None:
        """Make an engine; the one before is given up."""
        gc.unfreeze()
        if hasattr(self, "engine"):
            self.engine.close()
            del self.engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        defaults = {
            "max_batch_size": 512 // self._options.scale, "max_seq_len": 4096, "enable_prefix_caching": False,
            "tensor_parallel_size": self._options.tp, "max_adapters": self._options.adapters,
            "max_adapter_rank": self._options.adapter_rank,
        }  # fmt: skip
        torch.manual_seed(0)
        self.engine = ContinuousBatchingEngine.from_pretrained(
            self._options.model,
            config=EngineConfig(**{**defaults, **self._engine_options, **config}),
            random_weights=self._options.random_weights,
            with_tokenizer=False,
            progress=False,
        )
        gc.collect()
        gc.freeze()  # as a replica does

    def run(self, input_lens: list[int], output_lens: list[int], samplings: Sequence[Sampling] | None = None) -> float:
        """Seconds for requests of these lengths, from the first one handed over to the last token."""
        prompts = [self.prompt(length) for length in input_lens]
        return self.run_prompts(prompts, output_lens, samplings)

    def run_prompts(
        self, prompts: list[tuple[int, ...]], output_lens: list[int], samplings: Sequence[Sampling] | None = None
    ) -> float:
        """As `run`, with prompts made already."""
        samplings = samplings or [{}] * len(prompts)
        start = time.perf_counter()
        for prompt, length, sampling in zip(prompts, output_lens, samplings, strict=True):
            self.add(prompt, length, sampling)
        num_tokens = 0
        while self.engine.scheduler.has_pending_work:
            num_tokens += sum(len(output.token_ids) for output in self.engine.step())
        seconds = time.perf_counter() - start
        if num_tokens != sum(output_lens):
            raise RuntimeError(f"{num_tokens} tokens came out, {sum(output_lens)} were asked for")
        return seconds

    def adapted_rows(self, directory: Path) -> Iterator[Row]:
        """Rows with adapters, which are written to `directory`; the engine has been started with room for them."""
        num_adapters, rank = self._options.adapters, self._options.adapter_rank
        paths = write_adapters(self._options.model, directory, num_adapters, rank)
        refs = adapter_refs(paths)

        def run(input_lens: list[int], output_lens: list[int], adapters: Sequence[int | None]) -> float:
            samplings = [{} if which is None else {"adapter": refs[which]} for which in adapters]
            return self.run(input_lens, output_lens, samplings)

        yield from adapter_rows(run, num_adapters, rank, self._options.scale)
        yield rotation_row(_Steps(self), paths, self._options.rotating, self._options.scale)

    def add(self, prompt: tuple[int, ...], num_tokens: int, sampling: Sampling | None = None) -> str:
        """Hand a request over."""
        return self.engine.add_request(
            GenerationRequest(
                prompt_token_ids=prompt, max_new_tokens=num_tokens, temperature=TEMPERATURE, ignore_eos=True,
                **(sampling or {}),
            )
        )  # fmt: skip

    def read_prompts(self) -> None:
        """Step until every prompt has been read, and all that is left is to decode."""
        while self.engine.scheduler.num_waiting or self.engine.scheduler.num_waiting_tokens:
            self.engine.step()

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        """A prompt that the engine has not seen."""
        return random_prompt(self._rng, num_tokens, self.engine.model.config.vocab_size)

    def least_reads(self) -> LeastReads:
        """What a decode step of the engine reads at least."""
        model = self.engine.model
        weights = sum(weight.nbytes for weight in model.parameters())
        if model.config.num_experts:  # those of one token at least
            stacked = [module for module in model.modules() if isinstance(module, ExpertProjections)]
            unread = 1 - model.config.num_experts_per_token / model.config.num_experts
            weights -= round(unread * sum(each.nbytes for module in stacked for each in module.parameters()))
        if model.lm_head is not None:  # otherwise the embeddings are the head's weights, too
            weights -= model.embed_tokens.weight.nbytes
        setup = EngineSetup(model, self.engine.config, self.engine.max_seq_len)
        slot = len(model.page_groups) * setup.bytes_per_page // self.engine.config.page_size
        return LeastReads(weights, slot, 2 * model.config.state_bytes(model.dtype.itemsize))

    def own_rows(self) -> Iterator[Row]:
        """Rows that need engines of their own."""
        max_seq_len = self.engine.model.max_seq_len
        for row in long_rows(self.run, max_seq_len, self._options.scale):
            yield Row(row.name, lambda measure=row.measure: self._alone(measure))  # type: ignore[misc]
        yield Row("gap: 64 streams while 8000 tokens arrive", self._gap)
        yield Row("prefix: 256 x 2000 in, 90% shared, 64 out", self._prefix)
        yield Row("long: 8 x 32000 in, 256 out", self._long)
        if not torch.cuda.is_available():
            return
        yield Row("fp8: mixed, 8-bit weights", lambda: self._fp8(quantization="fp8"))
        yield Row("fp8: mixed, 8-bit weights and cache", lambda: self._fp8(quantization="fp8", kv_cache_dtype="fp8"))
        yield Row("deterministic: 256 alone and together, 64 out", self._deterministic)

    def _alone(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A row of one long prompt, in an engine with room for it."""
        longest = max(LONG_PROMPTS) // self._options.scale + 64
        self.start(max_seq_len=min(longest, self.engine.model.max_seq_len))
        return measure()

    def _gap(self) -> dict[str, Any]:
        """Gaps between the tokens of running streams from a long prompt's arrival to its first token."""
        scale = self._options.scale
        num_streams, long_len = 64 // scale, 8000 // scale
        self.start(max_seq_len=max(long_len + 64, 1024))
        long_prompt = self.prompt(long_len)  # made beforehand: that takes milliseconds, which would be in a gap
        streams = [self.add(self.prompt(128), 800 // scale) for _ in range(num_streams)]
        last: dict[str, float] = {}
        before: list[float] = []
        during: list[float] = []
        long_id, arrival, first_token_after = "", 0.0, None
        while self.engine.scheduler.has_pending_work:
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id == long_id:
                    first_token_after = first_token_after or now - arrival
                elif output.request_id in last and first_token_after is None:
                    (during if long_id else before).append(now - last[output.request_id])
                last[output.request_id] = now
            if not long_id and len(before) > 200 // scale * num_streams:
                before = before[len(before) // 2 :]  # without the start, when prompts were still being read
                arrival, long_id = now, self.add(long_prompt, 2)
        assert first_token_after is not None
        assert len(streams) == num_streams
        median, p99 = percentile(before, 0.5), percentile(during, 0.99)
        return {
            "median_gap_ms": round(median * 1e3, 2),
            "p99_gap_ms": round(p99 * 1e3, 2),
            "ratio": round(p99 / median, 2),
            "ttft_ms": round(first_token_after * 1e3),
        }

    def _prefix(self) -> dict[str, Any]:
        """Many prompts that begin alike: with the prefix cache, and without."""
        scale = self._options.scale
        num_requests, num_shared, num_own = 256 // scale, 1800 // scale, 200 // scale
        seconds = {}
        for cached in (False, True):
            self.start(enable_prefix_caching=cached)
            self.run([100] * 8, [16] * 8)
            shared = self.prompt(num_shared)
            self.run_prompts([shared], [1])
            prompts = [shared + self.prompt(num_own) for _ in range(num_requests)]
            seconds[cached] = self.run_prompts(prompts, [64 // scale] * num_requests)
        return {"s_cached": round(seconds[True], 3), "ratio": round(seconds[False] / seconds[True], 2)}

    def _long(self) -> dict[str, Any]:
        """A few long contexts."""
        scale = self._options.scale
        num_requests, num_in, num_steps = 8 // min(scale, 8), 32_000 // scale, 256 // scale
        most_out = 8 * num_steps  # so that none ends before the last has been read, beside which the others decode
        self.start(max_seq_len=num_in + most_out, max_batch_size=num_requests)
        self.run([num_in], [1])
        prefill = self.run([num_in] * num_requests, [1] * num_requests)
        for prompt in [self.prompt(num_in) for _ in range(num_requests)]:
            self.add(prompt, most_out)
        self.read_prompts()
        self.engine.step()
        decode = timed(lambda: [self.engine.step() for _ in range(num_steps)])
        num_running = self.engine.scheduler.num_running
        if num_running != num_requests:
            raise RuntimeError(f"{num_running} of {num_requests} contexts were left at the end")
        return {
            "input_tok_s": round(num_requests * num_in / prefill),
            "ms_per_step": round(decode / num_steps * 1e3, 3),
        }

    def _fp8(self, **config: Any) -> dict[str, Any]:
        """The mixed row in 8 bits, and in the model's own format."""
        seconds = []
        for options in ({}, config):
            self.start(**options)
            row = next(comparable_rows(self.run, self._options.scale)).measure()
            seconds.append(row["s"])
        return {"output_tok_s": row["output_tok_s"], "ratio": round(seconds[0] / seconds[1], 3)}

    def _deterministic(self) -> dict[str, Any]:
        """Requests whose tokens differ between alone and together, and what `deterministic` costs a step of all."""
        num_requests, num_steps = 256 // self._options.scale, 64 // min(self._options.scale, 8)
        seconds = []
        for deterministic in (False, True):
            self.start(deterministic=deterministic)
            lens = [self._rng.randint(20, 300) for _ in range(num_requests)]
            self.run(lens, [8] * num_requests)
            prefill = self.run([128] * num_requests, [1] * num_requests)
            seconds.append(self.run([128] * num_requests, [1 + num_steps] * num_requests) - prefill)
        requests = [
            GenerationRequest(
                prompt_token_ids=self.prompt(length), max_new_tokens=num_steps, temperature=0, ignore_eos=True
            )
            for length in lens
        ]
        together = self.engine.generate(requests, progress=False)
        alone = [self.engine.generate([request], progress=False)[0] for request in requests]
        return {
            "different": sum(a.token_ids != b.token_ids for a, b in zip(alone, together, strict=True)),
            "ms_per_step": round(seconds[1] / num_steps * 1e3, 3),
            "ratio": round(seconds[1] / seconds[0], 3),
        }


class _Steps:
    """`Steps` of the benchmark's engine."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def add(self, input_len: int, output_len: int, adapter: AdapterRef | None) -> str:
        """See `Steps.add`."""
        most = self._bench.engine.max_seq_len - input_len
        sampling = {} if adapter is None else {"adapter": adapter}
        return self._bench.add(self._bench.prompt(input_len), min(output_len, most), sampling)

    def step(self) -> list[str]:
        """See `Steps.step`."""
        outputs = self._bench.engine.step()
        if any(output.error for output in outputs):
            raise RuntimeError(next(output.error for output in outputs if output.error))
        return [output.request_id for output in outputs if output.token_ids]


def main() -> None:
    """Measure, print, and exit with 1 if a row failed."""
    options = _parse()
    bench = Bench(options, settings(options.set))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    common = {"engine": "rayline", "model": options.name or Path(options.model).name, "device": device}
    with ExitStack() as stack:
        out = stack.enter_context(open(options.out, "a")) if options.out else None
        bench.start()
        bench.run([16], [1])
        emit({**common, "name": "startup", "s": round(seconds_since_process_start(), 1)}, out)
        emit({**common, "name": "pool", "tokens": bench.engine.num_slots, **_memory_in_use()}, out)
        if options.profile is not None:
            profile(bench, options.profile or [1, 64, 256], options.context, scale=options.scale)
            if not options.rows:
                return
        rows = comparable_rows(bench.run, options.scale, bench.least_reads(), options.num_long)
        all_well = measure(rows, common, out, options.rows)
        emit({**common, "name": "memory", **_memory_in_use()}, out)
        if options.adapters:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            all_well &= measure(bench.adapted_rows(directory), common, out, options.rows)
            sys.exit(0 if all_well else 1)
        all_well &= measure(bench.own_rows(), common, out, options.rows)
    sys.exit(0 if all_well else 1)


def _memory_in_use() -> dict[str, float]:
    """Share of the GPU's memory that is taken, by whomever."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"memory_in_use": round(1 - free / total, 4)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with a config.json (and weights)")
    parser.add_argument("--random-weights", action="store_true", help="random weights of the model's shape")
    parser.add_argument("--rows", nargs="+", help="only rows whose names begin so")
    parser.add_argument(
        "--profile", nargs="*", type=int, metavar="BATCH",
        help="where the time of a step goes; no rows then, but those of --rows",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=128, help="tokens of the prompts behind which --profile decodes")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that hold the model together")
    parser.add_argument("--out", help="file to append the JSON lines to")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="fields of EngineConfig")
    parser.add_argument("--name", help="what the lines call the model; its directory's name if left out")
    add_options(parser)
    parser.add_argument("--rotating", type=int, default=500, metavar="N", help="adapters that rotate through these")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try the benchmark itself")
    return parser.parse_args()


if __name__ == "__main__":
    main()
