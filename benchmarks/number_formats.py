"""What number formats cost in log probability on real text, beside float32.

    rayline convert ~/.cache/rayline/models/SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python -m benchmarks.number_formats --model smollm2 [--text FILE …] [--tokens 4096]

The text (this project's own documentation unless told otherwise) is cut into pieces, and an engine for each format
reads them as prompts of one batch. The reference is the same model in float32 through plain PyTorch, one piece at a
time. For each token and each of the 20 likeliest tokens in its place, by the engine, the two log probabilities are
compared. One JSON line a format: the mean of these differences without their signs, the largest, the share of places
where both find the same likeliest token, and the perplexity of the text. Formats in 8 bits need a GPU.
"""

import argparse
import gc
import json
import math
from pathlib import Path

import torch

from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.loading import load_decoder
from llm.config import MAX_TOP_LOGPROBS, EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, GenerationResult
from llm.tokenization.hf_tokenizer import HFTokenizer

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = [DOCS / name for name in ("reliability.md", "scaling.md", "operations.md")]
PIECE_LEN = 512

FORMATS: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {}),
    "bfloat16": (torch.bfloat16, {}),
    "fp8 weights": (torch.bfloat16, {"quantization": "fp8"}),
    "fp8 cache": (torch.bfloat16, {"kv_cache_dtype": "fp8"}),
    "fp8 weights and cache": (torch.bfloat16, {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
}
"""The engine's number format and its settings, by name."""


def read_pieces(directory: Path, paths: list[Path], num_tokens: int) -> list[list[int]]:
    """Token ids of the texts, one behind the other, in pieces."""
    ids = HFTokenizer.from_pretrained(directory).encode("\n".join(path.read_text() for path in paths))[:num_tokens]
    return [piece for start in range(0, len(ids), PIECE_LEN) if len(piece := ids[start : start + PIECE_LEN]) > 1]


@torch.inference_mode()
def reference(directory: Path, pieces: list[list[int]], device: str) -> list[torch.Tensor]:
    """Log probabilities of each piece's tokens but the first: `(tokens, vocabulary)`, on the CPU."""
    torch.set_float32_matmul_precision("highest")
    model = load_decoder(directory, device=device, dtype=torch.float32, progress=False)
    return [model([piece])[0, :-1].log_softmax(-1).cpu() for piece in pieces]


def read_by_engine(directory: Path, pieces: list[list[int]], device: str, name: str) -> list[GenerationResult]:
    """The pieces as an engine of this format reads them, all in one batch."""
    dtype, settings = FORMATS[name]
    config = EngineConfig.model_validate({**settings, "max_seq_len": 2 * PIECE_LEN, "gpu_memory_utilization": 0.3})
    engine = ContinuousBatchingEngine.from_pretrained(
        directory, config=config, device=device, dtype=dtype, progress=False
    )
    requests = [
        GenerationRequest(prompt_token_ids=tuple(piece), max_new_tokens=0, prompt_logprobs=MAX_TOP_LOGPROBS)
        for piece in pieces
    ]
    return engine.generate(requests, progress=False)


def compare(name: str, results: list[GenerationResult], expected: list[torch.Tensor]) -> dict[str, object]:
    """The row of a format."""
    differences, own, num_same = [], [], 0
    for result, rows in zip(results, expected, strict=True):
        assert result.prompt_logprobs is not None
        for entry, row in zip(result.prompt_logprobs, rows, strict=True):
            ids, values = zip(*entry.top, strict=True)
            differences.append((torch.tensor(values) - row[list(ids)]).abs())
            own.append(entry.logprob)
            num_same += ids[0] == int(row.argmax())
    stacked = torch.stack(differences)
    return {
        "format": name,
        "mean_difference": float(f"{stacked.mean().item():.3g}"),
        "max_difference": float(f"{stacked.max().item():.3g}"),
        "same_likeliest": round(num_same / len(own), 4),
        "perplexity": round(math.exp(-sum(own) / len(own)), 3),
        "tokens": len(own),
    }


def main() -> None:
    """Print a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS))
    options = parser.parse_args()
    directory = resolve_model_path(options.model)
    pieces = read_pieces(directory, options.text, options.tokens)
    expected = reference(directory, pieces, options.device)
    default = [name for name, (_, settings) in FORMATS.items() if options.device != "cpu" or not settings]
    for name in options.formats or default:
        results = read_by_engine(directory, pieces, options.device, name)
        print(json.dumps(compare(name, results, expected)), flush=True)
        gc.collect()  # an engine ends where nothing refers to it
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
