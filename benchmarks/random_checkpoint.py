"""A checkpoint of a known shape with random weights and a tokenizer, to serve what cannot be downloaded.

    python -m benchmarks.random_checkpoint benchmarks/models/llama-3.1-8b OUT [--dtype bfloat16]

Its tokens are words, `t0 t1 …`, so every id can be sent and read back.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SHARD_BYTES = 4 << 30


def write_tokenizer(directory: Path) -> None:
    """Give a directory with a `config.json` a tokenizer over its whole vocabulary."""
    config = json.loads((directory / "config.json").read_text())
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("t", " t"), decoders.Fuse()])
    tokenizer.save(str(directory / "tokenizer.json"))
    eos = config["eos_token_id"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": f"t{eos[0] if isinstance(eos, list) else eos}",
        "unk_token": "t0",
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_weights(directory: Path, dtype: torch.dtype, device: str) -> None:
    """Give a directory with a `config.json` weights drawn from a normal distribution, in shards of up to 4 GiB."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    if getattr(config, "tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    torch.manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards = 0

    def flush() -> None:
        nonlocal shard, num_shards
        if shard:
            num_shards += 1
            name = f"model-{num_shards:05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, name))
            shard = {}

    for name, shape in shapes.items():
        is_norm = "norm" in name
        weight = torch.ones if is_norm else torch.randn
        shard[name] = (weight(shape.shape, dtype=dtype, device=device) * (1.0 if is_norm else 0.02)).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            flush()
    flush()
    total = sum(shape.numel() * shape.element_size() for shape in shapes.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def write_checkpoint(model: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Make a checkpoint of the shape that `model/config.json` describes; one that is there already is kept.

    Returns:
        `out`.
    """
    if not (out / "model.safetensors.index.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / "config.json", out / "config.json")
        write_tokenizer(out)
        write_weights(out, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    return out


def main() -> None:
    """Make the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory with a config.json")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    write_checkpoint(options.model, options.out, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
