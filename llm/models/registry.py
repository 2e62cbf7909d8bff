"""All supported families, by the architecture that a checkpoint's config.json names.

To add one, write its file like `llm.models.llama`, add a line here, and add its checkpoints to tests/unit/models.
"""

from dataclasses import replace

from llm.config import ModelConfig
from llm.models.classifiers import with_classifier
from llm.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from llm.models.family import Destination, Family
from llm.models.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT_HALF
from llm.models.glm4_moe import GLM4_MOE
from llm.models.glm4_moe_lite import GLM4_MOE_LITE
from llm.models.gpt_oss import GPT_OSS
from llm.models.label_keys import SUFFIX
from llm.models.llama import LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3
from llm.models.mistral3 import MISTRAL3_TEXT_HALF
from llm.models.mixtral import MIXTRAL
from llm.models.phi3 import PHI3
from llm.models.qwen3_5 import QWEN3_5, QWEN3_5_TEXT_HALF
from llm.models.qwen3_5_moe import QWEN3_5_MOE, QWEN3_5_MOE_TEXT_HALF
from llm.models.qwen3_moe import QWEN3_MOE
from llm.models.qwen3_next import QWEN3_NEXT

FAMILIES: dict[str, Family] = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_TEXT_HALF,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "GptOssForCausalLM": GPT_OSS,
    "LlamaForCausalLM": LLAMA,
    "Ministral3ForCausalLM": MINISTRAL3,
    "MinistralForCausalLM": MISTRAL,
    "Mistral3ForConditionalGeneration": MISTRAL3_TEXT_HALF,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5,
    "Qwen3_5ForConditionalGeneration": QWEN3_5_TEXT_HALF,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE,
    "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE_TEXT_HALF,
}

CLASSIFIERS: dict[str, str] = {
    name.replace("ForCausalLM", SUFFIX): name
    for name in FAMILIES
    if name.endswith("ForCausalLM") and not name.startswith(("Gemma3", "Glm4", "Qwen3_5"))
} | {
    f"Gemma3Text{SUFFIX}": "Gemma3ForCausalLM",
    f"Gemma3{SUFFIX}": "Gemma3ForConditionalGeneration",
    f"Qwen3_5{SUFFIX}": "Qwen3_5ForConditionalGeneration",
}
"""Classifiers that transformers has, and the families with the same decoders."""
FAMILIES |= {classifier: with_classifier(FAMILIES[name]) for classifier, name in CLASSIFIERS.items()}

_OUTSIDE_LAYERS = {"model.embed_tokens": "embed_tokens", "model.norm": "norm"}


def destinations(config: ModelConfig) -> dict[str, Destination]:
    """Destination of each module in a checkpoint of this shape, by its name in the checkpoint."""
    found = {theirs: Destination(ours) for theirs, ours in _OUTSIDE_LAYERS.items()}
    if config.classifier is not None:
        found["score"] = Destination("score")
    elif not config.tie_embeddings:
        found["lm_head"] = Destination("lm_head")
    inside = FAMILIES[config.architecture].layer_weights(config)
    for layer in range(config.num_layers):
        for theirs, place in inside.items():
            if place.layers is None or layer in place.layers:
                ours = replace(place, module=f"layers.{layer}.{place.module}")
                found[f"model.layers.{layer}.{theirs}"] = ours
    return found


def parts_of_modules(config: ModelConfig) -> dict[str, list[str]]:
    """For each module of the model, the checkpoint's names of the modules that it is made of, in checkpoint order."""
    found = destinations(config)
    one_by_one = {place.module for place in found.values() if place.expert is not None}
    parts: dict[str, list[str]] = {}
    for theirs, place in found.items():
        if place.stack is None or place.module not in one_by_one:  # a stack of what has names of its own is no part
            parts.setdefault(place.module, []).append(theirs)
    return parts
