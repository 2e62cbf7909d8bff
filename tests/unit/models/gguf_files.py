"""GGUF files of small models, written as llama.cpp's converter writes them, with the package's own writer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 300
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
ALPHABET = sorted(ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]


def tokens() -> list[str]:
    """Texts by id: bytes, what merges make, control tokens, and padding."""
    texts = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *CONTROL]
    return [*texts, *(f"[PAD{i}]" for i in range(VOCAB_SIZE - len(texts)))]


def byte_level_tokenizer(pre: str = "qwen2") -> dict[str, Any]:
    """Metadata of a tokenizer of `VOCAB_SIZE` ids."""
    texts = tokens()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in CONTROL else 5 if "[PAD" in text else 1 for text in texts],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": texts.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": texts.index("<|endoftext|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


def shape_metadata(architecture: str, config: PreTrainedConfig) -> dict[str, Any]:
    """What llama.cpp's converter says of a model's shape."""
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"],
            "vocab_size": config.vocab_size,
        }.items()
    }


def model_tensors(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """A model's weights under llama.cpp's names, which the package knows, and as its converter changes them.

    In Llama's, rows that turn together are neighbours; Gemma's norms have 1 on top.
    """
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = names.get_name(theirs, (".weight", ".bias"))
        assert name is not None, theirs
        numbers = tensor.numpy()
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            num_heads = model.config.num_attention_heads if ".attn_q." in name else model.config.num_key_value_heads
            halves = numbers.reshape(num_heads, 2, -1, *numbers.shape[1:])
            numbers = halves.swapaxes(1, 2).reshape(numbers.shape)
        if architecture.startswith("gemma") and "norm." in name:
            numbers = numbers + 1
        found[name] = np.ascontiguousarray(numbers)
    return found


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a file; matrices are quantized."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        _adder(writer, value)(key, value)
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and quantization is not gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    *,
    more_tensors: Mapping[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """Write a model with a tokenizer.

    Args:
        more_tensors: beside its own.
        changes: metadata, with `__` for dots; None takes a key out.
    """
    metadata = shape_metadata(architecture, model.config) | byte_level_tokenizer()
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, architecture, kept, {**model_tensors(architecture, model), **(more_tensors or {})})


def _adder(writer: gguf.GGUFWriter, value: Any) -> Callable[[str, Any], None]:
    match value:
        case bool():
            return writer.add_bool
        case int():
            return writer.add_uint32
        case float():
            return writer.add_float32
        case str():
            return writer.add_string
        case _:
            return writer.add_array
