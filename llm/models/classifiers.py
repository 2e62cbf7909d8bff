"""Sequence classification: the decoder of any family, with a head for labels in place of the head for tokens.

As transformers' `GenericForSequenceClassification`, a model multiplies the last token's final hidden state by
`score.weight`, (labels, hidden_size). The results are the logits of the labels that config.json names.
"""

from dataclasses import dataclass, replace

from llm.config import ClassifierConfig, ModelConfig
from llm.errors import ConfigError
from llm.models.config_keys import ReadKeys
from llm.models.family import Family
from llm.models.label_keys import label_names


def with_classifier(family: Family) -> Family:
    """The family of the same decoders with a head for labels."""
    return replace(family, read_config=_ClassifierReader(family))


@dataclass(frozen=True, slots=True)
class _ClassifierReader:
    """Reads the config.json of a classifier.

    Attributes:
        family: the same decoders with a head for tokens.
    """

    family: Family

    def __call__(self, config: ReadKeys, name: str) -> ModelConfig:
        if config.get("classifier_from_token") is not None:
            raise ConfigError(
                f"'classifier_from_token' describes a model with a head for tokens, and {name} has none; set "
                "'architectures' to the class that the weights were saved from, such as Qwen3ForCausalLM"
            )
        model = self.family.read_config(config, name)
        config.get("sbert_ce_default_activation_function")  # read as the function of scores, after the model
        text = config.get("text_config")
        head = ClassifierConfig(
            num_labels=len(label_names(config)),
            pad_token_id=(config if text is None else text).get("pad_token_id"),
        )
        return model.model_copy(update={"classifier": head, "tie_embeddings": False})
