"""What clients of Anthropic's API send, in all the forms that they have been seen to send."""

import hashlib
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.api.anthropic.schemas import MessagesRequest
from deployments.api.bodies import parse
from deployments.router.keys import ApiKey

HI = {"role": "user", "content": "hi"}
BY = {"role": "user", "content": "and?"}
TOOL = {"name": "add", "input_schema": {"type": "object"}}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}]}


def chat_of(*messages: dict, **fields: object) -> list[dict]:
    """The messages of the chat that a request stands for, as templates are told."""
    request = MessagesRequest.model_validate({"model": "demo", "max_tokens": 5, "messages": list(messages), **fields})
    return [message.turn() for message in request.to_chat().messages]


def result(content: object) -> dict:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": content}]}


async def ask(service: Service, *messages: dict, **fields: object) -> dict:
    answer = await service.post("/v1/messages", messages=list(messages), **{"max_tokens": 300, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_system_message_may_stand_among_the_messages():
    late = {"role": "system", "content": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]}
    turns = chat_of(HI, late, BY, system="Be brief.")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be brief."), ("user", "hi"), ("system", "Be kind."), ("user", "and?")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "system",
    [
        [{"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.5; cch=NUMBER;"},
         {"type": "text", "text": "You are an agent."}],
        [{"type": "text", "text": "x-anthropic-billing-header: cch=NUMBER;\nYou are an agent."}],
        "x-anthropic-billing-header: cch=NUMBER;\n\nYou are an agent.",
    ],
)  # fmt: skip
def test_the_line_that_changes_each_time_is_left_out(system: str | list[dict]):
    """Else no two requests of a client would share a prefix."""
    text = str(system)
    for number in ("1a2b3", "99999"):
        numbered = (
            text.replace("NUMBER", number) if isinstance(system, str)
            else [{**block, "text": block["text"].replace("NUMBER", number)} for block in system]
        )  # fmt: skip
        assert chat_of(HI, system=numbered)[0] == {"role": "system", "content": "You are an agent."}
    assert "billing" in chat_of({"role": "user", "content": "x-anthropic-billing-header: what is it?"})[0]["content"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("18", "18"),
        (None, ""),
        ([], ""),
        ([{"type": "image", "source": {"type": "base64", "data": "AAAA"}}], "[image]"),
        ([{"type": "text", "text": "a cat"}, {"type": "image", "source": {}}], "a cat\n[image]"),
        ([{"type": "document", "source": {"type": "base64", "data": "AAAA"}}], "[document]"),
        ([{"type": "document", "title": "A", "source": {"type": "text", "data": "words"}}], "A\nwords"),
        ([{"type": "search_result", "title": "A", "source": "http://x", "content": [{"type": "text", "text": "b"}]}],
         "A\nb"),
        ([{"type": "tool_reference", "tool_name": "x"}], "x"),
        ([{"x": 1}], "[None]"),
    ],
)  # fmt: skip
def test_results_of_tools_are_told_as_text(content: object, told: str):
    assert chat_of(HI, USE, result(content))[-1] == {"role": "tool", "tool_call_id": "t", "content": told}


@pytest.mark.parametrize(
    ("content", "turn"),
    [
        ("", {"content": ""}),
        (None, {"content": ""}),
        ([], {"content": ""}),
        ([{"type": "thinking", "thinking": "hm", "signature": "x"}], {"content": "", "reasoning_content": "hm"}),
        ([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "yes", "citations": None}],
         {"content": "yes"}),
        ([{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
          {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}], {"content": ""}),
    ],
)  # fmt: skip
def test_what_the_assistant_said_is_never_refused(content: object, turn: dict):
    assert chat_of(HI, {"role": "assistant", "content": content}, BY)[1] == {"role": "assistant", **turn}


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"input": None}, {}),
        ({"input": '{"a": '}, '{"a": '),
        ({"input": [1]}, "[1]"),
        ({"input": {"a": 1}}, {"a": 1}),
    ],
)
def test_broken_calls_are_told_as_they_are(fields: dict, arguments: object):
    use = {"type": "tool_use", "id": "t", "name": "odd name", "caller": {"type": "direct"}, **fields}
    (called,) = chat_of(HI, {"role": "assistant", "content": [use]}, result("18"))[1]["tool_calls"]
    assert called["function"] == {"name": "odd name", "arguments": arguments}


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("system", {"type": "tool_result", "tool_use_id": "t"}),
        ("assistant", {"type": "tool_result", "tool_use_id": "t"}),
        ("system", {"type": "tool_use", "id": "t", "name": "add"}),
        ("user", {"type": "thinking", "thinking": "hm"}),
        ("user", {"x": 1}),
        ("system", {"type": "document", "source": {"type": "url", "url": "http://x"}}),
    ],
)
async def test_blocks_in_the_wrong_place_are_named(make_service: ServiceFactory, role: str, block: dict):
    service = await make_service()
    answer = await service.post("/v1/messages", messages=[HI, {"role": role, "content": [block]}], max_tokens=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("messages[1].content[0]: ")


async def test_images_of_the_user_are_refused_by_name(make_service: ServiceFactory):
    service = await make_service()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    answer = await service.post("/v1/messages", messages=messages, max_tokens=5)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "messages[0].content[1]: this model takes text only, not 'image'"


@pytest.mark.parametrize("last", ["It is ", [{"type": "text", "text": "It is "}]])
async def test_a_last_message_of_the_assistant_goes_on(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path, last: object
):
    """The answer holds only what comes behind, and counting tokens counts the same prompt."""
    use_script(monkeypatch, "42.")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    messages = [HI, {"role": "assistant", "content": last}]
    message = await ask(service, *messages)
    assert message["content"] == [{"type": "text", "text": "42."}]
    usage = message["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert prompt == len("user: hiassistant: It is "), "one token a byte, and nothing behind"
    counted = await service.post("/v1/messages/count_tokens", messages=messages)
    assert counted.json()["input_tokens"] == prompt


async def test_a_last_message_of_nothing_but_a_call_is_answered(make_service: ServiceFactory, monkeypatch, tmp_path):
    use_script(monkeypatch, "Done.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    assert (await ask(service, HI, USE))["content"] == [{"type": "text", "text": "Done."}]


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "medium"}},
        {"thinking": {"type": "enabled", "budget_tokens": 31_999}},
        {"output_config": {"effort": "a new one"}},
        {"tools": [{**TOOL, "name": "mcp__a" + "b" * 122}]},
        {"tools": [{**TOOL, "toolset_name": None, "defer_loading": True, "input_examples": [{"a": 1}]}]},
        {"tools": [], "tool_choice": {"type": "auto"}},
        {"tools": None, "tool_choice": {"type": "none"}},
        {"stop_sequences": [f"stop {i}" for i in range(20)]},
        {"top_p": 0},
        {"top_k": 5.0, "max_tokens": 4.0},
        {"mcp_servers": [], "container": None},
        {"metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "fast", "betas": ["x"]},
    ],
)
async def test_what_agents_send_is_taken(make_service: ServiceFactory, monkeypatch, tmp_path: Path, fields: dict):
    use_script(monkeypatch, "ok")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    await ask(service, HI, **fields)


async def test_thoughts_can_be_turned_off_and_are_on_else(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "ok</think>42")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    assert [block["type"] for block in (await ask(service, HI, thinking={"type": "adaptive"}))["content"]] == [
        "thinking", "text"
    ]  # fmt: skip
    assert [block["type"] for block in (await ask(service, HI, thinking={"type": "disabled"}))["content"]] == ["text"]


async def test_an_overlong_prompt_is_told_in_the_words_that_clients_look_for(make_service: ServiceFactory):
    """By these, agents make the conversation shorter and go on."""
    service = await make_service()
    long = {"role": "user", "content": "hi " * 5000}
    for path, fields, words in (
        ("/v1/messages", {"messages": [long], "max_tokens": 5}, "prompt is too long: "),
        ("/v1/messages/count_tokens", {"messages": [long]}, None),
        ("/v1/chat/completions", {"messages": [long]}, "This model's maximum context length is 2048 tokens"),
        ("/v1/completions", {"prompt": long["content"]}, "This model's maximum context length is 2048 tokens"),
        ("/v1/responses", {"input": long["content"]}, "This model's maximum context length is 2048 tokens"),
    ):
        answer = await service.post(path, **fields)
        if words is not None:
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith(words), answer.text
        if path.startswith("/v1/messages") and words is not None:
            assert answer.json()["error"]["message"].endswith(" tokens > 2048 maximum")


async def test_answers_have_an_id_for_the_clients_log(make_service: ServiceFactory):
    """Whole, streamed, and refused."""
    service = await make_service(keys=(ApiKey("team", hashlib.sha256(b"sk-1").digest()),))
    body = {"model": "demo", "messages": [HI], "max_tokens": 3}
    key = {"x-api-key": "sk-1"}
    asked = (({}, key, 200), ({"stream": True}, key, 200), ({"messages": 5}, key, 400), ({}, {}, 401))
    for fields, headers, status in asked:
        answer = await service.http.post("/v1/messages", json={**body, **fields}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["request-id"].startswith("req_")
        named = await service.http.post(
            "/v1/messages", json={**body, **fields}, headers={**headers, "x-request-id": "mine"}
        )
        assert named.headers["request-id"] == "mine"
    other = await service.http.post("/v1/chat/completions", json=body, headers=key)
    assert "request-id" not in other.headers


async def test_a_key_may_come_in_both_headers(make_service: ServiceFactory):
    service = await make_service(keys=(ApiKey("team", hashlib.sha256(b"sk-1").digest()),))
    body = {"model": "demo", "messages": [HI], "max_tokens": 3}
    for bearer, key, status in (("sk-1", "sk-1", 200), ("sk-1", "other", 401), ("other", "sk-1", 401)):
        headers = {"authorization": f"Bearer {bearer}", "x-api-key": key}
        assert (await service.http.post("/v1/messages", json=body, headers=headers)).status_code == status
    for empty in ("Bearer ", "Bearer"):
        headers = {"authorization": empty, "x-api-key": "sk-1"}
        assert (await service.http.post("/v1/messages", json=body, headers=headers)).status_code == 200
        assert (await service.http.post("/v1/messages", json=body, headers={"authorization": empty})).status_code == 401


def test_a_request_as_agents_send_it_has_its_ignored_fields_named():
    body = (
        b'{"model":"demo","max_tokens":32000,"stream":true,"metadata":{"user_id":"u"},"context_management":{"edits":[]},'
        b'"system":[{"type":"text","text":"x","cache_control":{"type":"ephemeral","ttl":"1h"}}],"messages":[{"role":'
        b'"user","content":[{"type":"text","text":"a","cache_control":{"type":"ephemeral"}}]}],"tools":[{"name":"a",'
        b'"input_schema":{"$schema":"x"},"eager_input_streaming":true}]}'
    )
    _, ignored = parse(MessagesRequest, body)
    assert set(ignored) == {
        "metadata", "context_management", "messages[0].content[0].cache_control", "tools[0].eager_input_streaming"
    }  # fmt: skip
