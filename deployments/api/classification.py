"""`/v1/classify`: bodies and answers, in vLLM's form."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deployments.api.openai.embeddings import InputFields, check_input, inputs_of
from deployments.api.openai.responses import EmbeddingUsage, ResponseModel
from deployments.chat.encoder import PromptEncoder
from deployments.chat.errors import invalid
from deployments.chat.labels import labelled
from deployments.chat.messages import ChatMessage, check_continued, check_messages
from deployments.chat.requests import MAX_MESSAGES, Prompt
from deployments.chat.truncation import encode_inputs
from deployments.chat.wire_model import Items
from llm.checkpoint.label_defaults import LabelActivation, LabelDefaults
from llm.serving.schemas import new_request_id

_OF_CHATS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class ClassifyRequest(InputFields):
    """Body of `POST /v1/classify`: `input`, or `messages` for a model that judges chats."""

    input: Annotated[Any, BeforeValidator(check_input, json_schema_input_type=Prompt)] = None
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    messages: Annotated[Items[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    """A chat, which the model's chat template makes one text of."""
    add_generation_prompt: bool | None = None
    """With messages: end with the text that opens another answer. False by default."""
    continue_final_message: bool | None = None
    """With messages: end where the last message, which must be an assistant's, ends."""
    chat_template_kwargs: dict[str, Any] | None = None
    """With messages: variables for the model's chat template."""
    use_activation: bool | None = None
    """False for the logits in place of the probabilities."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise invalid("give exactly one of input and messages", "input")
        for name in _OF_CHATS:
            if self.messages is None and getattr(self, name) is not None:
                raise invalid(f"{name}: only with messages", name)
        if self.messages is not None:
            check_messages(self.messages)
            if self.truncation is not None:
                raise invalid("truncate_prompt_tokens: only with input", "truncate_prompt_tokens")
        if self.continue_final_message:
            check_continued(self.messages, self.add_generation_prompt)
        return self

    @property
    def takes_long(self) -> bool:
        """See `RequestBody`; a template may do a lot of work."""
        return self.messages is not None

    def prompts(self, encoder: PromptEncoder) -> list[list[int]]:
        """Tokens of each text to be classified; a chat is one.

        Raises:
            APIError: a 400.
            InvalidRequestError: the template refuses the messages.
        """
        if self.messages is None:
            return encode_inputs(encoder, inputs_of(self.input), self.truncation)
        ids = encoder.chat_ids(
            self.messages,
            add_generation_prompt=bool(self.add_generation_prompt),
            variables=self.chat_template_kwargs or {},
            is_continued=bool(self.continue_final_message),
        )
        encoder.check_ids(ids, "messages")
        encoder.check_length(ids, "messages")
        return [ids]


class ClassifiedText(ResponseModel):
    """The labels of one input."""

    index: int
    label: str
    """The likeliest label."""
    probs: list[float]
    """The probability of each label, in the order of the model's `id2label`; what its `problem_type` makes of the
    logits."""
    num_classes: int
    """How many labels there are."""


class ClassifyResponse(ResponseModel):
    """Answer of `POST /v1/classify`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ClassifiedText]
    usage: EmbeddingUsage


def classify_object(
    body: ClassifyRequest, model: str, vectors: Sequence[bytes], labels: LabelDefaults, num_tokens: int
) -> dict[str, Any]:
    """The answer.

    Args:
        vectors: logits of each input's labels.
    """
    activation = LabelActivation.IDENTITY if body.use_activation is False else labels.activation
    found = [labelled(vector, labels.names, activation) for vector in vectors]
    data = [
        {"index": index, "label": each.label, "probs": each.probs, "num_classes": len(each.probs)}
        for index, each in enumerate(found)
    ]
    head = {"id": f"classify-{new_request_id()}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": data, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}
