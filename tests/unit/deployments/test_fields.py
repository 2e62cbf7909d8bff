"""The rule on fields: what is unknown or without effect is ignored and named, what this server lacks is refused."""

import codecs
import json
import logging

import pytest
from in_process import ServiceFactory, emulated_config

from deployments.api.bodies import parse
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.chat.errors import APIError
from deployments.chat.ignored import MAX_FIELDS, header_value
from deployments.chat.requests import ChatRequest, CompletionRequest
from deployments.chat.wire_model import RequestBody

HI = [{"role": "user", "content": "hi"}]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HEADER = "x-rayline-ignored"


def body(**fields: object) -> bytes:
    return json.dumps({"model": "demo", "messages": HI, **fields}).encode()


def ignored(model: type[RequestBody] = ChatRequest, **fields: object) -> list[str]:
    return parse(model, body(**fields))[1]


@pytest.mark.parametrize(
    ("path", "fields", "names"),
    [
        (CHAT, {"temprature": 1, "client_metadata": {"a": 1}}, {"temprature", "client_metadata"}),
        (CHAT, {"user": 5, "metadata": "x", "verbosity": "medium"}, {"user", "metadata", "verbosity"}),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "id": "m", "name": None}]}, {"messages[0].id"}),
        (CHAT, {"tools": None, "tool_choice": None, "response_format": None, "logit_bias": None}, set()),
        (CHAT, {"audio": None, "functions": [], "function_call": "none"}, {"functions", "function_call"}),
        (CHAT, {"modalities": ["text"], "web_search_options": False}, {"modalities", "web_search_options"}),
        (MESSAGES, {"context_management": {"edits": []}, "speed": "fast"}, {"context_management", "speed"}),
        (MESSAGES, {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
         {"system[0].cache_control"}),
        (MESSAGES, {"tools": [{"name": "a", "input_schema": {}, "defer_loading": True, "input_examples": [{}]}],
                    "tool_choice": {"type": "none"}}, {"tools[0].defer_loading", "tools[0].input_examples"}),
        (RESPONSES, {"input": "hi", "client_metadata": {}, "truncation": "auto"}, {"client_metadata", "truncation"}),
        (RESPONSES, {"input": "hi", "text": {"verbosity": "low", "x": 1}}, {"text.verbosity", "text.x"}),
    ],
)  # fmt: skip
async def test_what_cannot_change_the_answer_is_ignored_and_named(
    make_service: ServiceFactory, path: str, fields: dict, names: set[str]
):
    """In the header of a whole answer and of a streamed one."""
    limit = {"max_output_tokens": 2} if path == RESPONSES else {"max_tokens": 2}
    service = await make_service()
    for is_streamed in (False, True):
        conversation = {} if path == RESPONSES else {"messages": HI}
        answer = await service.post(path, **{**conversation, **limit, **fields, "stream": is_streamed})
        assert answer.status_code == 200, answer.text
        found = set(filter(None, answer.headers.get(HEADER, "").split(", ")))
        assert found == names


async def test_the_header_comes_with_an_error_too(make_service: ServiceFactory):
    service = await make_service()
    answer = await service.post(CHAT, messages=HI, max_tokens=10**6, unknown=1)
    assert (answer.status_code, answer.headers[HEADER]) == (400, "unknown")


async def test_what_was_ignored_is_in_the_debug_log(make_service: ServiceFactory, serve_log):
    logging.getLogger("ray.serve").setLevel(logging.DEBUG)
    service = await make_service()
    await service.post(CHAT, messages=HI, max_tokens=1, unknown=1)
    assert "fields ignored: unknown" in [record.getMessage() for record in serve_log]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temprature": 1}, "temprature"),
        ({"messages": [{"role": "user", "content": "hi", "naem": "x"}]}, "messages[0].naem"),
    ],
)
async def test_strict_fields_brings_the_refusal_back(make_service: ServiceFactory, fields: dict, named: str):
    service = await make_service(emulated_config(strict_fields=True))
    answer = await service.post(CHAT, **{"messages": HI, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", named)
    fine = await service.post(CHAT, messages=HI, max_tokens=1, user="u", metadata={}, verbosity="medium", tools=None)
    assert fine.status_code == 200, fine.text


async def test_the_nearest_name_is_told(make_service: ServiceFactory):
    service = await make_service(emulated_config(strict_fields=True))
    answer = await service.post(CHAT, messages=HI, temprature=1)
    assert "did you mean 'temperature'?" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ChatRequest, {"audio": {"voice": "x"}}),
        (ChatRequest, {"functions": [{"name": "f"}]}),
        (ChatRequest, {"function_call": {"name": "f"}}),
        (ChatRequest, {"prediction": {"type": "content", "content": "x"}}),
        (ChatRequest, {"web_search_options": {}}),
        (ChatRequest, {"modalities": ["text", "audio"]}),
        (CompletionRequest, {"prompt": "a", "suffix": "b"}),
        (ResponsesRequest, {"input": "a", "background": True}),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(model: type[RequestBody], fields: dict):
    name = list(fields)[-1]
    with pytest.raises(APIError) as raised:
        ignored(model, **fields)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, name, "unsupported_parameter")


def test_null_is_absence_at_every_depth():
    value = {"messages": [*HI, None], "stop": ["a", None], "stream_options": None, "tools": [
        {"type": "function", "function": {"name": "a", "description": None, "parameters": {"enum": [None], "x": None}}},
        None,
    ]}  # fmt: skip
    parsed, names = parse(ChatRequest, body(**value))
    assert (len(parsed.messages), parsed.stop, names) == (1, ["a"], [])
    assert parsed.tools[0].function.parameters == {"enum": [None], "x": None}, "a schema is no field of ours"
    with pytest.raises(APIError, match="Missing required field 'messages'"):
        ignored(messages=None)


def test_whole_numbers_may_be_written_as_floats():
    parsed, _ = parse(ChatRequest, body(max_tokens=3.0, n=2.0, seed=-1.0, stop_token_ids=[5.0], temperature=1))
    assert (parsed.max_tokens, parsed.n, parsed.seed, parsed.stop_token_ids) == (3, 2, -1, [5])
    assert type(parsed.max_tokens) is int
    completion, _ = parse(CompletionRequest, body(prompt=[[1.0, 2], [3]]))
    assert completion.prompt == [[1, 2], [3]]
    for wrong in ({"max_tokens": 3.5}, {"max_tokens": "3"}, {"max_tokens": True}, {"max_tokens": 1e18 + 0.0, "n": 1.5}):
        with pytest.raises(APIError):
            ignored(**wrong)


def test_a_byte_order_mark_is_no_part_of_the_json():
    parsed, _ = parse(ChatRequest, codecs.BOM_UTF8 + body())
    assert parsed.messages[0].content == "hi"


def test_what_is_told_of_ignored_fields_is_bounded():
    many = {f"field_{i}_{'x' * 300}": i for i in range(1000)}
    paths = ignored(**many)
    assert len(paths) == MAX_FIELDS
    value = header_value(paths)
    assert len(value) <= 1024
    assert value.endswith(", ...")


def test_a_name_cannot_break_the_header():
    (path,) = ignored(**{"a\r\nSet-Cookie: b, \u2028é": 1})
    assert path == "a??Set-Cookie:?b????"


def test_the_first_of_many_stands_for_all():
    """A long conversation with a mark on each message has one name in the header."""
    messages = [{"role": "user", "content": "hi"}, *[{"role": "user", "content": "hi", "mark": 1}] * 500]
    assert ignored(messages=messages) == ["messages[1].mark"]
