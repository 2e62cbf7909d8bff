"""What structured output costs a step: rows bound by a JSON schema beside free ones.

    python -m benchmarks.grammar [--rows 64] [--vocab-size 128256] [--layers 8 --hidden-size 1024]

Random weights, a vocabulary of made-up words over bytes. One JSON line a row: `masks` is the time to work out which
tokens the rows may draw, as a step does; `step` the median step with free rows, with rows all of which are bound, and
their ratio.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.sampling.constraint import Int32Array, TokenMasks
from llm.sampling.grammar import GrammarCompiler
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, Grammar
from llm.tokenization.hf_tokenizer import HFTokenizer
from llm.tokenization.special_tokens import SpecialTokens

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "summary": {"type": "string"},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 30},
    },
    "required": ["title", "summary", "score", "tags"],
    "additionalProperties": False,
}
GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))


def make_tokenizer(vocab_size: int) -> HFTokenizer:
    """A byte-level vocabulary: all bytes, one end token, and words of letters, some with a space or quote in front."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys([*alphabet, "<end>"])
    while len(words) < vocab_size:
        word = "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 9)))
        words[rng.choice(["", "", "Ġ", "Ġ", '"', '",', ":"]) + word] = None
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return HFTokenizer(tokenizer.to_str(), special_tokens=SpecialTokens(named={"eos_token": "<end>"}))


def time_masks(tokenizer: HFTokenizer, num_rows: int, num_steps: int = 100) -> dict[str, Any]:
    """Milliseconds a step for the masks of `num_rows` rows, each at a place of its own."""
    compiler = GrammarCompiler(tokenizer)
    started = time.perf_counter()
    constraints = [compiler.start(GRAMMAR).result()]
    compile_s = time.perf_counter() - started
    constraints += [compiler.start(GRAMMAR).result() for _ in range(num_rows - 1)]
    masks, rng = TokenMasks(tokenizer.vocab_size), random.Random(0)
    bits = np.empty((num_rows, masks.num_words), dtype=np.int32)
    times = []
    for _ in range(num_steps):
        started = time.perf_counter()
        masks.write(dict(enumerate(constraints)), bits)
        times.append(time.perf_counter() - started)
        for constraint, row in zip(constraints, bits, strict=True):
            constraint.take(_any_bit(row, rng))
    return {"row": "masks", "rows": num_rows, "vocab_size": tokenizer.vocab_size, "compile_ms": _ms(compile_s),
            "p50_ms": _ms(statistics.median(times)), "max_ms": _ms(max(times))}  # fmt: skip


def time_steps(tokenizer: HFTokenizer, num_rows: int, model: DecoderModel, num_steps: int = 40) -> dict[str, Any]:
    """Median step with free rows and with bound ones, in milliseconds; the two take turns."""
    config = EngineConfig(max_batch_size=num_rows, max_seq_len=512)
    engine = ContinuousBatchingEngine(model, tokenizer, config=config)
    medians: dict[str, list[float]] = {"free": [], "bound": []}
    for turn in range(6):
        kind = "bound" if turn % 2 else "free"
        for seed in range(num_rows):
            engine.add_request(
                GenerationRequest(
                    prompt_token_ids=(1, 2, 3), max_new_tokens=400, temperature=1.0, seed=seed,
                    grammar=GRAMMAR if kind == "bound" else None, ignore_eos=kind == "free",
                )
            )  # fmt: skip
        while engine.stats().num_running < num_rows:
            engine.step()
        times, ids = [], set()
        for _ in range(num_steps):
            started = time.perf_counter()
            ids |= {output.request_id for output in engine.step()}
            times.append(time.perf_counter() - started)
        for request_id in ids:
            engine.abort(request_id)
        medians[kind].append(statistics.median(times))
    free, bound = (statistics.median(medians[kind]) for kind in ("free", "bound"))
    return {"row": "step", "rows": num_rows, "vocab_size": tokenizer.vocab_size, "device": str(model.device),
            "free_ms": _ms(free), "bound_ms": _ms(bound), "ratio": round(bound / free, 3)}  # fmt: skip


def _any_bit(words: Int32Array, rng: random.Random) -> int:
    """The place of a bit that is set."""
    places = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    return int(rng.choice(places))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def main() -> None:
    """Print both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = make_tokenizer(options.vocab_size)
    print(json.dumps(time_masks(tokenizer, options.rows)), flush=True)
    torch.manual_seed(0)
    is_cuda = torch.cuda.is_available()
    model = DecoderModel(
        vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_layers=options.layers,
        num_heads=options.hidden_size // 64, num_kv_heads=max(1, options.hidden_size // 256), max_seq_len=512,
        device="cuda" if is_cuda else "cpu", dtype=torch.bfloat16 if is_cuda else torch.float32,
    )  # fmt: skip
    print(json.dumps(time_steps(tokenizer, options.rows, model)), flush=True)


if __name__ == "__main__":
    main()
