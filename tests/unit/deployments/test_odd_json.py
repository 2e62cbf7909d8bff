"""JSON that is odd but meant well, and what is said of JSON that is wrong."""

import json

import pytest
from pydantic import BaseModel

from deployments.api.anthropic.schemas import MessagesRequest
from deployments.api.bodies import parse
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.chat.errors import APIError
from deployments.chat.requests import ChatRequest, CompletionRequest

JSON = {"Content-Type": "application/json"}


def body_with(text: str) -> bytes:
    return b'{"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": "%s"}]}' % text.encode()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"cut \ud83d", "cut �"),
        (r"cut \uD83D in two \uDE00", "cut � in two �"),
        (r"\ude00", "�"),
        (r"\ud83d\ud83d\ude00", "�😀"),
        (r"whole \ud83d\ude00", "whole 😀"),
        (r"text of six characters \\ud83d and \ud83d", r"text of six characters \ud83d and �"),
        (r"\ud83d\\", "�\\"),
        (r"\ud83d\n\u0041", "�\nA"),
    ],
)
def test_half_a_surrogate_pair_becomes_the_replacement_character(written: str, read: str):
    """Agents cut the results of tools after so many UTF-16 units, in the middle of an emoji; JSON can say it, and no
    text can hold it. Refused, the conversation could never go on."""
    body, _ = parse(ChatRequest, body_with(written))
    assert body.messages[0].content == read


@pytest.mark.parametrize(
    "body",
    [
        body_with(r"\ud83d")[:-1],
        b"[" + body_with(r"\ud83d") + b"]",
        body_with(r"\ud83d")[:-1] + rb', "stop": "\ud83d"}',
        body_with(r"\ud83d")[:-1] + b', "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        body_with(r"\ud83d")[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_else_is_wrong_is_still_refused(body: bytes):
    with pytest.raises(APIError, match="not valid JSON"):
        parse(ChatRequest, body)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (ResponsesRequest, {"input": []}, "input: List should have at least 1 item"),
        (ResponsesRequest, {"input": 5}, "input: Input should be a valid string"),
        (MessagesRequest, {"max_tokens": 1, "messages": [{"role": "user", "content": 5}]}, "valid string"),
        (CompletionRequest, {"prompt": [{"text": "a"}]}, "prompt: must be a string, a list of strings"),
        (CompletionRequest, {"prompt": [True]}, "token ids must be whole numbers"),
    ],
)
def test_the_form_that_was_meant_is_told(model: type[BaseModel], fields: dict, words: str):
    with pytest.raises(APIError) as raised:
        parse(model, json.dumps({"model": "demo", **fields}).encode())
    assert words in str(raised.value)
