"""What a GGUF file says of its model, as the config.json of a Hugging Face checkpoint would say it.

Keys and names of modules are llama.cpp's (gguf-py/gguf/constants.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np

from llm.checkpoint.gguf_file import GGUFFile
from llm.errors import CheckpointError

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all releases of Llama 3.1 to 3.3 have beside the factor; a file holds only what comes out of it."""
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor that belongs to the configuration."""
POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}
"""How vectors are made, by llama.cpp's numbers, in the words of sentence-transformers; 0 is for a model without any,
and 4, a head for scores, is not supported."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0, *POOLINGS),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_log_multiplier": (0, 1),
}
"""Keys that are not read, with the values at which they change nothing."""
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout"})
"""Keys that are not read and say nothing new."""

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SCALE_SIZES = ("embedding_length", "attention.head_count", "block_count", "attention.key_length")

Keys = dict[str, Any]
"""The architecture's own metadata, without its prefix. Who reads a key takes it out."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one of llama.cpp's architectures are read.

    Attributes:
        model_type, class_name: transformers' names.
        read_more: keys of config.json beside those that all architectures have.
        layer_names: modules of a layer, from llama.cpp's names to transformers'.
        has_paired_rows: neighbouring rows of queries and keys turn together, where transformers pairs a row of a
            head's first half with one of its second.
        norm_offset: what the file's norm weights have on top.
    """

    model_type: str
    class_name: str
    read_more: Callable[[Keys, GGUFFile], dict[str, Any]]
    layer_names: Mapping[str, str]
    has_paired_rows: bool = False
    norm_offset: float = 0.0


def _llama_keys(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    del keys
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _qwen_keys(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    del keys, file
    return {"use_sliding_window": False}


def _gemma_2_keys(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    return {
        **_gemma_keys(keys, file, num_layers_of_27b=46),
        "attn_logit_softcapping": decimal(keys.pop("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": decimal(keys.pop("final_logit_softcapping", 30.0)),
    }


def _gemma_3_keys(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    pattern = keys.pop("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):  # for each layer, whether it has a window
        windows = {"layer_types": ["sliding_attention" if has_window else "full_attention" for has_window in pattern]}
    else:
        windows = {"sliding_window_pattern": pattern}
    return {
        **_gemma_keys(keys, file, num_layers_of_27b=62),
        **windows,
        "rope_local_base_freq": decimal(keys.pop("rope.freq_base_swa", 1e4)),
        "final_logit_softcapping": keys.pop("final_logit_softcapping", None),
    }


def _gemma_keys(keys: Keys, file: GGUFFile, *, num_layers_of_27b: int) -> dict[str, Any]:
    """What both generations have; files do not say what scores are scaled by, which is another width in 27B alone."""
    prefix = file.metadata["general.architecture"]
    hidden_size, num_heads, num_layers, head_dim = (file.metadata[f"{prefix}.{name}"] for name in _SCALE_SIZES)
    is_27b = num_layers == num_layers_of_27b
    return {
        "sliding_window": keys.pop("attention.sliding_window"),
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
    }


_ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama_keys, _LAYER, has_paired_rows=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen_keys, _LAYER),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen_keys, {**_LAYER, **_HEAD_NORMS}),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma_2_keys, _GEMMA_LAYER, norm_offset=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _gemma_3_keys, {**_GEMMA_LAYER, **_HEAD_NORMS}, norm_offset=1.0
    ),
}


def find_architecture(file: GGUFFile) -> Architecture:
    """How this file is read.

    Raises:
        CheckpointError: its architecture is not supported.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported in GGUF files; supported: {', '.join(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[name]


def make_config(file: GGUFFile) -> dict[str, Any]:
    """Content of the config.json of the checkpoint that the file was made of.

    Raises:
        CheckpointError: the file lacks a value, or has one that changes the model and is not understood.
    """
    architecture = find_architecture(file)
    prefix = f"{file.metadata['general.architecture']}."
    keys = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    try:
        config = {
            "architectures": [architecture.class_name],
            "model_type": architecture.model_type,
            **_common_keys(keys, file),
            **architecture.read_more(keys, file),
        }
    except KeyError as error:
        raise CheckpointError(f"{file.path} lacks {prefix}{error.args[0]}; convert the model again") from error
    for key, value in keys.items():
        if key not in _HARMLESS and value not in _NEUTRAL.get(key, ()):
            raise CheckpointError(
                f"{file.path}: {prefix}{key} ({str(value)[:80]}) may change what the model computes, and is not "
                "supported; use the model's checkpoint in safetensors"
            )
    return config


def _common_keys(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    """What all architectures have in common."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} lacks token_embd.weight; is it the model, and not an adapter or projector?")
    hidden_size, num_heads = keys.pop("embedding_length"), of_all_layers(keys.pop("attention.head_count"))
    num_kv_heads = of_all_layers(keys.pop("attention.head_count_kv", num_heads))
    if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
        raise CheckpointError(f"{file.path}: numbers of heads that differ by layer are not supported")
    head_dim = keys.pop("attention.key_length", hidden_size // max(num_heads, 1))
    theta = decimal(keys.pop("rope.freq_base", 1e4))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := keys.pop(key, head_dim)) != head_dim:
            raise CheckpointError(f"{file.path}: {key} {value} is not supported, as heads have a width of {head_dim}")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": of_all_layers(keys.pop("feed_forward_length")),
        "num_hidden_layers": keys.pop("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.pop("context_length"),
        "rms_norm_eps": decimal(keys.pop("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, file, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def of_all_layers(value: Any) -> Any:
    """A value that some files give as a list with an item for each layer, if all items are the same."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def decimal(value: float) -> float:
    """The number that was meant by one that went through float32: 1e-5, not 9.99999974e-06."""
    return float(f"{value:.7g}")


def _rope_scaling(keys: Keys, file: GGUFFile, head_dim: int, theta: float) -> dict[str, Any] | None:
    kind = keys.pop("rope.scaling.type", "linear")  # older files give a factor alone
    factor = keys.pop("rope.scaling.factor", None) or keys.pop("rope.scale_linear", None)
    original_len = keys.pop("rope.scaling.original_context_length", None)
    attention_factor = keys.pop("rope.scaling.attn_factor", None)
    betas = {name: keys.pop(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, head_dim, theta)
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind not in ("linear", "yarn") or factor is None:
        raise CheckpointError(f"{file.path}: RoPE scaling {kind!r} is not supported; supported: linear, yarn")
    scaling = {"rope_type": kind, "factor": decimal(factor)}
    if kind == "yarn":
        scaling |= {"original_max_position_embeddings": original_len, "attention_factor": attention_factor, **betas}
    return {key: value for key, value in scaling.items() if value is not None}


def _llama3_scaling(file: GGUFFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, found again from what it divides each frequency by."""
    found = file.read(ROPE_FACTORS)
    factor = decimal(float(found.max(initial=1.0)))
    wavelengths = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    smooth = np.clip((_LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise CheckpointError(f"{file.path}: {ROPE_FACTORS} is not Llama 3's, and other factors are not supported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
