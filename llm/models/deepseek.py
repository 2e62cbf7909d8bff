"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, and experts, some of them shared.

Keys of config.json and names of weights follow transformers' `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from llm.attention.rope import RotaryEmbedding
from llm.attention.spec import AttentionSpec
from llm.config import LatentConfig, ModelConfig
from llm.models.attention_layer import make_norm, make_rope
from llm.models.config_keys import ReadKeys
from llm.models.experts import Experts
from llm.models.family import Destination, Family, Layer, common_fields
from llm.models.glm4_moe import feed_forward_weights
from llm.models.latent import LatentHeads
from llm.models.operations import Operations
from llm.models.routed_keys import MTP, read_leading_dense_layers, read_routed_experts

_SIZES: dict[str, Any] = {
    "rms_norm_eps": 1e-6, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
"""Values that transformers uses for missing keys, like the next ones."""
_V2_DEFAULTS = {**_SIZES, "q_lora_rank": 1536, "first_k_dense_replace": 0, "n_shared_experts": 2}
_V3_DEFAULTS = {
    **_SIZES, "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip


class LatentLayer(Layer):
    """Latent attention, then experts or the feed-forward.

    Args:
        index: index of the layer, from 0.
        rope: the model's rotary embedding.
    """

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        shape = config.latent
        assert shape is not None, "the family's reader gives one"
        hidden_size, num_heads, norm = config.hidden_size, config.num_heads, make_norm(config)
        self.index = index
        self.spec = AttentionSpec(
            num_heads, 1, config.head_size, rope, scale=config.attention_scale, value_dim=shape.rank
        )
        self.attention_norm = norm(hidden_size)
        self.heads = LatentHeads(num_heads, shape)
        self.latent_proj = nn.Linear(hidden_size, sum(self.heads.sizes), bias=False)
        self.o_proj = nn.Linear(num_heads * shape.value_dim, hidden_size, bias=False)
        self.mlp_norm = norm(hidden_size)
        if config.has_experts(index):
            self.experts = Experts.of(config)
        else:
            self.gate_up_proj = nn.Linear(hidden_size, 2 * config.mlp_size, bias=False)
            self.down_proj = nn.Linear(config.mlp_size, hidden_size, bias=False)

    def forward(self, operations: Operations[Any]) -> None:
        """See `Layer.forward`."""
        projected = operations.product_of_norm(self.attention_norm, self.latent_proj)
        attended = operations.attend_latents(self.index, self.spec, projected, self.heads)
        operations.add_product(attended, self.o_proj)
        if hasattr(self, "experts"):
            operations.add_experts(self.mlp_norm, self.experts)
        else:
            operations.add_gated_mlp(self.mlp_norm, self.gate_up_proj, self.down_proj)


def make_layers(config: ModelConfig) -> list[Layer]:
    """The layers of a model of this shape."""
    rope = make_rope(config)
    return [LatentLayer(config, index, rope) for index in range(config.num_layers)]


def layer_weights(config: ModelConfig) -> Mapping[str, Destination]:
    """Destinations of a checkpoint's modules within a `LatentLayer`."""
    shape = config.latent
    assert shape is not None, "the family's reader gives one"
    query = shape.query_rank or config.num_heads * (shape.plain_dim + shape.rope_dim)
    found = {
        "input_layernorm": Destination("attention_norm"),
        "self_attn.kv_a_proj_with_mqa": Destination("latent_proj", slice(query, query + config.head_size)),
        "self_attn.kv_a_layernorm": Destination("heads.kv_norm"),
        "self_attn.kv_b_proj": Destination("heads.kv_proj"),
        "self_attn.o_proj": Destination("o_proj"),
        "post_attention_layernorm": Destination("mlp_norm"),
        **feed_forward_weights(config),
    }
    if shape.query_rank is None:
        return {**found, "self_attn.q_proj": Destination("latent_proj", slice(0, query))}
    return {
        **found,
        "self_attn.q_a_proj": Destination("latent_proj", slice(0, query)),
        "self_attn.q_a_layernorm": Destination("heads.q_norm"),
        "self_attn.q_b_proj": Destination("heads.q_proj"),
    }


def read_latent_attention(config: ReadKeys) -> dict[str, Any]:
    """The fields of `ModelConfig` about sizes, RoPE and latent attention."""
    shape = LatentConfig(
        rank=config["kv_lora_rank"],
        query_rank=config.get("q_lora_rank"),
        plain_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        is_interleaved=config.get("rope_interleave", True),
    )
    for key in ("num_key_value_heads", "head_dim", "qk_head_dim"):
        config.get(key)  # what follows from the others: heads of latents are not those of keys
    fields = common_fields(config)
    scaling, width = fields["rope_scaling"], shape.plain_dim + shape.rope_dim
    sharpness = 1.0
    if scaling is not None and scaling.mscale_all_dim and scaling.factor > 1:  # beside YaRN's own, on cos and sin
        sharpness = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1
    heads = {"num_kv_heads": 1, "head_dim": shape.rank + shape.rope_dim, "latent": shape}
    return {**fields, **heads, "attention_scale": sharpness**2 * width**-0.5}


def _read_config(config: ReadKeys, name: str, *, is_v3: bool) -> ModelConfig:
    config.fill(_V3_DEFAULTS if is_v3 else _V2_DEFAULTS)
    for key in ("auto_map", *(["num_nextn_predict_layers"] if is_v3 else [])):
        config.get(key)  # transformers and this file have since implemented the code that it points to
    return ModelConfig(
        **read_latent_attention(config),
        **read_routed_experts(config, uses_sigmoid=is_v3),
        architecture=name,
        dense_layers=read_leading_dense_layers(config),
    )


DEEPSEEK_V2 = Family(partial(_read_config, is_v3=False), make_layers, layer_weights)
DEEPSEEK_V3 = Family(
    partial(_read_config, is_v3=True), make_layers, layer_weights, left_out=MTP, has_layers_behind=True
)
