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

from llm.checkpoint.model_config import load_model_config
from llm.checkpoint.slots import Slot
from llm.checkpoint.weight_slots import find_slots
from llm.models.decoder import DecoderModel

_SHARD_BYTES = 4 << 30
_STD = 0.02


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
    """Give a directory with a `config.json` random weights in the format that it says, in shards of up to 4 GiB.

    Tensors are those that files of the architecture hold, each expert's by themselves.
    """
    torch.manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    num_shards, num_bytes = 0, 0

    def flush() -> None:
        nonlocal shard, num_shards
        if shard:
            num_shards += 1
            name = f"model-{num_shards:05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(shard, name))
            shard = {}

    config = load_model_config(directory)
    group_size = None if config.quantization is None else config.quantization.formats[0].group_size
    slots = find_slots(DecoderModel.from_config(config, device="meta", dtype=dtype))
    stacks = {slot.stack for slot in slots.values()}
    for name, slot in slots.items():
        if slot.is_optional or name in stacks:
            continue
        shard[name] = _random(name, slot, group_size, dtype, device).cpu()
        num_bytes += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            flush()
    flush()
    document = {"metadata": {"total_size": num_bytes}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document))


def _random(name: str, slot: Slot, group_size: int | None, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of a slot's shape and type: weights about as large as those of 16 bits, whatever they are stored in."""
    shape, leaf = slot.shapes[0], name.rpartition(".")[2]
    if leaf.endswith("g_idx"):
        return torch.arange(shape[0], dtype=torch.int32, device=device) // (group_size or shape[0])
    if "U8" in slot.kinds:
        is_scale = leaf.endswith("_scales")
        return torch.randint(120 if is_scale else 0, 122 if is_scale else 256, shape, dtype=torch.uint8, device=device)
    if "I32" in slot.kinds:
        return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, device=device).int()
    if "F8_E4M3" in slot.kinds:
        return torch.randn(shape, dtype=dtype, device=device).to(torch.float8_e4m3fn)
    if leaf in ("scales", "weight_scale"):
        return torch.full(shape, 1 / 64 if leaf == "weight_scale" else 1 / 256, dtype=dtype, device=device)
    return (
        torch.ones(shape, dtype=dtype, device=device)
        if "norm" in name
        else _STD * torch.randn(shape, dtype=dtype, device=device)
    )


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
