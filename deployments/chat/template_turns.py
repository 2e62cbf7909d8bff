"""Renders a chat's turns in a form that the model's chat template accepts."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from deployments.chat.errors import invalid
from llm.errors import InvalidRequestError
from llm.tokenization.chat_template import LIMIT_EXCEEDED, MAX_RENDER_CPU_S
from llm.tokenization.hf_tokenizer import HFTokenizer, RenderedChat

Turn = dict[str, Any]


def render_turns(
    tokenizer: HFTokenizer, turns: Sequence[Turn], *, is_continued: bool = False, **options: Any
) -> RenderedChat:
    """The chat's text.

    Templates differ in what they refuse. If one refuses the turns as they are, other forms are tried: arguments that
    are not a JSON object are put inside one, all system messages become one at the front, consecutive user turns become
    one, and the system's text goes in front of the user's.

    Args:
        turns: the turns in the form that templates expect, first turn first.
        is_continued: the text ends where the last turn's content ends, as with transformers' `continue_final_message`.
        options: see `HFTokenizer.render_chat`.

    Raises:
        InvalidRequestError: the template refuses the turns in every form; gives its message about the first form.
        APIError: the last turn is to be continued, and the template does not show it.
    """
    mark = f"<end-{secrets.token_hex(8)}>"
    if is_continued:
        turns = [*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + mark}]
        options["add_generation_prompt"] = False
    refused: InvalidRequestError | None = None
    started = time.thread_time()
    for form in _forms(turns):
        try:
            chat = tokenizer.render_chat(form, **options)
        except InvalidRequestError as error:
            refused = refused or error
            if error.code == LIMIT_EXCEEDED or time.thread_time() - started > MAX_RENDER_CPU_S:
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


def _forms(turns: Sequence[Turn]) -> Iterator[list[Turn]]:
    """The turns, then other forms that differ from them, closest first; each form keeps the changes of the previous
    ones."""
    form = list(turns)
    yield form
    for change in (_with_objects, _with_one_system_turn, _with_alternating_turns, _without_system_turn):
        changed = change(form)
        if changed != form:
            form = changed
            yield form


def _with_objects(turns: list[Turn]) -> list[Turn]:
    """Make the arguments of each call an object: a text is put inside one."""
    return [
        {**turn, "tool_calls": [_with_object(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], dict):
        return call
    return {**call, "function": {**function, "arguments": {"arguments": function["arguments"]}}}


def _with_one_system_turn(turns: list[Turn]) -> list[Turn]:
    """Combine the texts of all system messages into one at the front."""
    texts = [turn["content"] for turn in turns if turn["role"] == "system"]
    if not texts:
        return turns
    return [{"role": "system", "content": "\n\n".join(texts)}, *(turn for turn in turns if turn["role"] != "system")]


def _with_alternating_turns(turns: list[Turn]) -> list[Turn]:
    """Combine consecutive user turns into one."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and turn["role"] == merged[-1]["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def _without_system_turn(turns: list[Turn]) -> list[Turn]:
    """Put the text of the system message in front of the user's."""
    if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return turns
    system, user, *rest = turns
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
