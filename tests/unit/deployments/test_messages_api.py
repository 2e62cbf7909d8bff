"""Anthropic's Messages API without a socket; the client's own types say whether answers are well formed."""

import hashlib
import json
from pathlib import Path

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from in_process import Service, ServiceFactory
from pydantic import TypeAdapter
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.api.openai.responses import InputTokens, MessageObject
from deployments.router.keys import ApiKey

TOOL = {"name": "add", "description": "Adds", "input_schema": {"type": "object", "properties": {"a": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 17}}</tool_call>'
HI = [{"role": "user", "content": "hi"}]
EVENTS = TypeAdapter(RawMessageStreamEvent)


async def ask(service: Service, **fields) -> dict:
    answer = await service.post("/v1/messages", **{"messages": HI, "max_tokens": 300, **fields})
    assert answer.status_code == 200, answer.text
    Message.model_validate_json(answer.content)
    MessageObject.model_validate_json(answer.content, strict=True)
    return answer.json()


async def streamed(service: Service, **fields) -> dict:
    """A stream put together as Anthropic's clients do."""
    answer = await service.post("/v1/messages", stream=True, **{"messages": HI, "max_tokens": 300, **fields})
    events = []
    for block in answer.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
        if events[-1]["type"] != "ping":
            EVENTS.validate_json(data.removeprefix("data: "))
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    message = events[0]["message"]
    is_open = False
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert not is_open
                assert event["index"] == len(message["content"])
                message["content"].append({**event["content_block"], "json": ""})
                is_open = True
            case "content_block_delta":
                assert is_open
                block, delta = message["content"][event["index"]], event["delta"]
                field = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
                name = field[delta["type"]]
                key = "json" if name == "partial_json" else name
                block[key] += delta[name]
            case "content_block_stop":
                assert is_open
                is_open = False
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert not is_open
    for block in message["content"]:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    return message


async def test_text(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "It is 42.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    for message in (await ask(service, system="Be brief."), await streamed(service, system="Be brief.")):
        assert message["content"] == [{"type": "text", "text": "It is 42."}]
        assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
        usage = message["usage"]
        assert usage["output_tokens"] == 10
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 20


async def test_thoughts_and_calls_are_blocks(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, f"Add them.</think>I add.{CALL}{CALL}")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    for message in (await ask(service, tools=[TOOL]), await streamed(service, tools=[TOOL])):
        assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
        assert message["content"][0]["thinking"] == "Add them."
        assert message["content"][2]["input"] == {"a": 17}
        assert message["stop_reason"] == "tool_use"


async def test_how_a_message_ends(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "It is 42.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    assert (await ask(service, max_tokens=3))["stop_reason"] == "max_tokens"
    stopped = await ask(service, stop_sequences=["is", "nothing"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "is")
    assert stopped["content"] == [{"type": "text", "text": "It "}]


async def test_a_conversation_with_tools_and_its_tokens(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "Done.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    messages = [
        *HI,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "18"}]},
            {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
        ]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}]
    message = await ask(service, messages=messages, system=system, tools=[TOOL], tool_choice={"type": "auto"})
    usage = message["usage"]
    counted = await service.post("/v1/messages/count_tokens", messages=messages, system=system, tools=[TOOL])
    InputTokens.model_validate_json(counted.content, strict=True)
    assert counted.json()["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


async def test_forced_calls(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    tool = {"name": "add", "input_schema": schema}
    for choice in ({"type": "tool", "name": "add"}, {"type": "any", "disable_parallel_tool_use": True}):
        message = await ask(service, tools=[tool], tool_choice=choice)
        (block,) = message["content"]
        assert isinstance(block["input"]["n"], int)
        assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "none"}]}]},
        {"temperature": 1.5},
        {"tools": [{"name": "no spaces", "input_schema": {}}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}},
        {"tool_choice": {"type": "tool"}},
        {"container": "c"},
    ],
)
async def test_errors_have_anthropics_shape(make_service: ServiceFactory, tmp_path: Path, changes: dict):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    answer = await service.post("/v1/messages", **{"messages": HI, "max_tokens": 5, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert set(answer.json()["error"]) == {"type", "message"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "wizard"}}}}, "output_config.format"),
    ],
)
async def test_errors_name_the_field(make_service: ServiceFactory, tmp_path: Path, changes: dict, named: str):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    answer = await service.post("/v1/messages", **{"messages": HI, "max_tokens": 5, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(f"{named}:"), answer.text


async def test_an_answer_with_a_schema(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    config = {"effort": "max", "format": {"type": "json_schema", "schema": schema}}
    message = await ask(service, output_config=config)
    assert isinstance(json.loads(message["content"][0]["text"])["n"], int)
    assert message["stop_reason"] == "end_turn"


async def test_keys_models_and_bodies(make_service: ServiceFactory, tmp_path: Path):
    digest = hashlib.sha256(b"sk-1").digest()
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE), keys=(ApiKey("team", digest),))
    body = {"model": "demo", "messages": HI, "max_tokens": 3}
    without = await service.http.post("/v1/messages", json=body)
    assert (without.status_code, without.json()["error"]["type"]) == (401, "authentication_error")
    headers = {"x-api-key": "sk-1"}
    assert (await service.http.post("/v1/messages", json=body, headers=headers)).status_code == 200
    other = await service.http.post("/v1/messages", json={**body, "model": "other"}, headers=headers)
    assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")
    broken = await service.http.post(
        "/v1/messages", content=b"{", headers={**headers, "content-type": "application/json"}
    )
    assert (broken.status_code, broken.json()["type"]) == (400, "error")
