"""What clients of OpenAI's chats send beside the plain fields."""

from pathlib import Path

import pytest
from in_process import ServiceFactory
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.chat.errors import PromptTooLongError
from deployments.chat.requests import ChatRequest

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
A, B = ({"type": "function", "function": {"name": name}} for name in "ab")


def allowed(mode: str, *tools: dict) -> dict:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


async def test_the_model_is_told_of_allowed_tools_only(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "ok")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))

    async def num_prompt_tokens(**fields: object) -> int:
        answer = await service.post(CHAT, messages=HI, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    both = await num_prompt_tokens(tools=[A, B])
    only = await num_prompt_tokens(tools=[A])
    assert await num_prompt_tokens(tools=[A, B], tool_choice=allowed("auto", A)) == only < both
    assert await num_prompt_tokens(tools=[A, B], tool_choice=allowed("auto", A, B)) == both


async def test_required_among_allowed_tools_calls_one_of_these(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    answer = await service.post(CHAT, messages=HI, tools=[A, B], tool_choice=allowed("required", B), max_tokens=200,
                                parallel_tool_calls=False)  # fmt: skip
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "b"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [A, {"type": "custom", "custom": {"name": "x"}}]}, "tools[1].type", "not supported"),
        ({"tools": [A], "tool_choice": allowed("auto", B)}, "tool_choice", "no tool 'b'"),
        ({"tools": [A], "tool_choice": {"type": "custom"}}, "tool_choice", "must be none, auto"),
    ],
)  # fmt: skip
async def test_what_is_refused_is_named(make_service: ServiceFactory, tmp_path: Path, fields, param: str, words: str):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    answer = await service.post(CHAT, messages=HI, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


async def test_many_tools_and_many_stop_strings(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "one two three")
    service = await make_service(
        model_config(tmp_path, TOOL_TEMPLATE, emulation={"tokens_per_s": 5000.0, "max_seq_len": 32_000})
    )
    tools = [{"type": "function", "function": {"name": f"f{i}" + "x" * 120}} for i in range(150)]
    stop = [*(f"nothing {i}" for i in range(30)), "three"]
    answer = await service.post(CHAT, messages=HI, tools=tools, stop=stop)
    assert answer.json()["choices"][0]["message"]["content"] == "one two "


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"ok": True, "é": 1}, '{"ok": true, "é": 1}'),
        (18, "18"),
        (False, "false"),
        ([{"type": "text", "text": "a"}], "a"),
    ],
)
def test_results_of_tools_may_be_any_value(content: object, told: str):
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "a", "arguments": "{}"}}]}
    result = {"role": "tool", "tool_call_id": "c", "content": content}
    request = ChatRequest.model_validate({"model": "demo", "messages": [*HI, call, result]})
    assert request.messages[-1].turn()["content"] == told


async def test_a_prefix_is_continued(make_service: ServiceFactory, tmp_path: Path):
    """As in DeepSeek's and Mistral's APIs, whose word it is for `continue_final_message`."""
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))

    async def num_prompt_tokens(**fields: object) -> int:
        answer = await service.post(CHAT, max_tokens=1, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    last = {"role": "assistant", "content": "It is "}
    continued = await num_prompt_tokens(messages=[*HI, last], continue_final_message=True)
    assert await num_prompt_tokens(messages=[*HI, {**last, "prefix": True}]) == continued
    assert await num_prompt_tokens(messages=[*HI, {**last, "prefix": False}]) > continued
    assert await num_prompt_tokens(messages=[*HI, {**last, "prefix": True}, *HI]) > continued
    assert await num_prompt_tokens(messages=[{**HI[0], "prefix": True}]) == await num_prompt_tokens(messages=HI)


async def test_top_p_0_is_greedy(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    texts = set()
    for fields in ({"temperature": 0}, {"top_p": 0}, {"top_p": 0.0, "temperature": 2}):
        answer = await service.post(CHAT, messages=HI, max_tokens=30, **fields)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["message"]["content"])
    assert len(texts) == 1


async def test_thoughts_are_counted_in_usage(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "a" * 30 + "</think>" + "b" * 10)
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    usage = (await service.post(CHAT, messages=HI)).json()["usage"]
    share = usage["completion_tokens_details"]["reasoning_tokens"] / usage["completion_tokens"]
    assert 0.7 < share < 0.8, "three quarters of the text"
    plain = (await service.post(CHAT, messages=HI, reasoning_effort="none")).json()["usage"]
    assert plain["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_litellm_knows_an_overlong_prompt_by_its_words():
    # Here, since it takes seconds, and every process of the tests imports this file.
    import litellm.exceptions
    from litellm.litellm_core_utils.exception_mapping_utils import ExceptionCheckers

    error = PromptTooLongError("at least 5000", 2048, "messages")
    assert ExceptionCheckers.is_error_str_context_window_exceeded(str(error))
    assert issubclass(litellm.exceptions.ContextWindowExceededError, litellm.exceptions.BadRequestError)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_usage": True}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text", "json_schema": None}},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "x"}}]}]},
        {"messages": [{"role": "developer", "content": "x"}, *HI, {"role": "system", "content": "y"}]},
    ],
)  # fmt: skip
async def test_what_asks_for_nothing_special_is_taken(make_service: ServiceFactory, fields: dict):
    service = await make_service()
    answer = await service.post(CHAT, **{"messages": HI, "max_tokens": 3, **fields})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [A, B]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [*HI, {"role": "assistant", "content": "It is "}], "continue_final_message": True},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "a"}}]},
                      {"role": "tool", "tool_call_id": "c", "content": "18"}], "tools": [A]},
    ],
)  # fmt: skip
async def test_tokenizing_counts_the_prompt_of_the_chat(make_service: ServiceFactory, tmp_path: Path, fields: dict):
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    body = {"messages": HI, **fields}
    tokens = await service.post("/tokenize", **body)
    plain = await service.post("/tokenize", messages=HI)
    chat = await service.post(CHAT, max_tokens=1, **body)
    assert tokens.json()["count"] == chat.json()["usage"]["prompt_tokens"] != plain.json()["count"]
