"""The text half of Mistral Small 3.1 and later, which take images: a Mistral or Ministral 3 in `text_config`."""

from llm.config import ModelConfig
from llm.models.config_keys import ReadKeys, key_names
from llm.models.family import Family, read_text_half
from llm.models.llama import MINISTRAL3, MISTRAL

_IMAGE_KEYS = key_names("""
    vision_config image_token_index image_token_id projector_hidden_act vision_feature_layer multimodal_projector_bias
    spatial_merge_size
""")


def _read_text(config: ReadKeys, name: str) -> ModelConfig:
    family = MINISTRAL3 if config.get("model_type") == "ministral3" else MISTRAL
    return family.read_config(config, name)


def _read_config(config: ReadKeys, name: str) -> ModelConfig:
    return read_text_half(config, name, _read_text, _IMAGE_KEYS)


MISTRAL3_TEXT_HALF = Family(_read_config, MISTRAL.make_layers, MISTRAL.layer_weights, left_out="images")
