"""A chat's turns, told to a model's chat template in a form that it takes."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from deployments.chat.errors import invalid
from llm.errors import InvalidRequestError
from llm.tokenization.chat_template import LIMIT_EXCEEDED
from llm.tokenization.hf_tokenizer import HFTokenizer, RenderedChat

Turn = dict[str, Any]


def render_turns(
    tokenizer: HFTokenizer, turns: Sequence[Turn], *, is_continued: bool = False, **options: Any
) -> RenderedChat:
    """The chat's text.

    Templates differ in what they refuse. Where one refuses the turns as they are, they are told in another form: with
    arguments that are no JSON object inside one, and with all system messages as one in front.

    Args:
        turns: as templates know them, the first one first.
        is_continued: the text ends where the last turn's content ends, as with transformers' `continue_final_message`.
        options: see `HFTokenizer.render_chat`.

    Raises:
        InvalidRequestError: the template refuses the turns in every form; what it said of the first one.
        APIError: the last turn is to be continued, and the template does not show it.
    """
    mark = f"<end-{secrets.token_hex(8)}>"
    if is_continued:
        turns = [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + mark}]
        options["add_generation_prompt"] = False
    refused: InvalidRequestError | None = None
    for form in _forms(turns):
        try:
            chat = tokenizer.render_chat(form, **options)
        except InvalidRequestError as error:
            refused = refused or error
            if error.code == LIMIT_EXCEEDED:
                break
        else:
            return _cut(chat, mark) if is_continued else chat
    assert refused is not None, "there is a first form"
    raise refused


def _cut(chat: RenderedChat, mark: str) -> RenderedChat:
    """The chat up to the mark."""
    text, found, _ = chat.text.partition(mark)
    if not found:
        raise invalid("messages: the model's chat template does not show the last message, which is to be continued",
                      "messages")  # fmt: skip
    return RenderedChat(text, chat.disguise)


def _forms(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The turns, then those other forms that differ from them, the closest first."""
    yield turns
    with_objects = [_with_objects(turn) for turn in turns]
    has_texts = with_objects != list(turns)
    if has_texts:
        yield with_objects
    merged = _with_one_system_turn(with_objects)
    if merged != with_objects:
        yield merged


def _with_objects(turn: Turn) -> Turn:
    """The turn with the arguments of each call as an object."""
    calls = turn.get("tool_calls", ())
    if all(isinstance(call["function"]["arguments"], dict) for call in calls):
        return turn
    return {**turn, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], dict):
        return call
    return {**call, "function": {**function, "arguments": {"arguments": function["arguments"]}}}


def _with_one_system_turn(turns: list[Turn]) -> list[Turn]:
    """The turns with the texts of all system messages in front."""
    system = [turn for turn in turns if turn["role"] == "system"]
    if not system or (len(system) == 1 and turns[0] is system[0]):
        return turns
    content = "\n\n".join(turn["content"] for turn in system)
    return [{"role": "system", "content": content}, *(turn for turn in turns if turn["role"] != "system")]
