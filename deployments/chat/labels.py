"""Labels of texts, as a classifier gives them, and what it is not asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deployments.channel.messages import EngineInfo
from deployments.chat.errors import APIError, invalid
from llm.checkpoint.label_defaults import LabelActivation
from llm.serving.schemas import GenerationRequest, Pooling


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a classifier says of one text.

    Attributes:
        label: name of the label with the highest number.
        probs: a number for each label.
    """

    label: str
    probs: list[float]


def check_generates(info: EngineInfo) -> None:
    """Refuse to ask a classifier for tokens or for vectors, for which it has no head.

    Raises:
        APIError: a 400.
    """
    if info.num_labels:
        one = ", and with pairs of texts /v1/rerank or /v1/score" if info.num_labels == 1 else ""
        raise invalid(
            "model: this model gives labels to texts, and neither generates text nor makes vectors; ask POST "
            f"/v1/classify{one}",
            "model",
        )


def cannot_classify() -> APIError:
    """The error for a model without a head for labels."""
    return invalid("model: this model has no head for labels, so it cannot classify; name one that has", "model")


def label_request(ids: Sequence[int]) -> GenerationRequest:
    """The request for the logits of a prompt's labels."""
    return GenerationRequest(prompt_token_ids=tuple(ids), pooling=Pooling.LABELS)


def activated(vector: bytes, activation: LabelActivation) -> list[float]:
    """The numbers that an activation makes of the logits of a text's labels."""
    logits = np.frombuffer(vector, np.float32).astype(np.float64)
    match activation:
        case LabelActivation.SOFTMAX:
            powers = np.exp(logits - logits.max())
            found = powers / powers.sum()
        case LabelActivation.SIGMOID:
            found = np.exp(-np.logaddexp(0, -logits))
        case LabelActivation.IDENTITY:
            found = logits
    numbers: list[float] = found.tolist()
    return numbers


def labelled(vector: bytes, names: Sequence[str], activation: LabelActivation) -> Labelled:
    """What the logits of a text's labels say of it."""
    probs = activated(vector, activation)
    return Labelled(names[int(np.argmax(probs))], probs)
