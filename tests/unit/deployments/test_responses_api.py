"""OpenAI's Responses API without a socket; the client's own types say whether events are well formed."""

import json
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.api.openai.responses import ResponseObject

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 17}}</tool_call>'
EVENTS = TypeAdapter(ResponseStreamEvent)


async def respond(service: Service, **fields) -> dict:
    answer = await service.post("/v1/responses", **{"input": "hi", **fields})
    assert answer.status_code == 200, answer.text
    Response.model_validate_json(answer.content, strict=True)
    ResponseObject.model_validate_json(answer.content, strict=True)
    return answer.json()


async def streamed(service: Service, **fields) -> list[dict]:
    """The events of a stream, checked: types, order, numbers, and that the pieces make up what is said to be done."""
    answer = await service.post("/v1/responses", stream=True, **{"input": "hi", **fields})
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
        EVENTS.validate_json(data.removeprefix("data: "))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    texts: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
        elif event["type"] in ("response.output_text.done", "response.reasoning_text.done"):
            assert texts[event["item_id"]] == event["text"]
        elif event["type"] == "response.function_call_arguments.done":
            assert texts[event["item_id"]] == event["arguments"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    return events


async def test_text(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "It is 42.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    response = await respond(service, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5)
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "It is 42.", "annotations": [], "logprobs": []}]
    assert (response["status"], response["temperature"], response["metadata"]) == ("completed", 0.5, {"a": "b"})
    assert response["usage"]["output_tokens"] == 10, "nine bytes and the end"
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + 10
    events = await streamed(service)
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "It is 42."


async def test_thoughts_and_calls_are_items(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, f"Add them.</think>I add.{CALL}{CALL}")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    response = await respond(service, tools=[TOOL])
    thoughts, text, *calls = response["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "Add them."}]
    assert text["content"][0]["text"] == "I add."
    assert [(call["type"], call["name"], call["arguments"]) for call in calls] == [
        ("function_call", "add", '{"a": 17}')
    ] * 2
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]
    events = await streamed(service, tools=[TOOL])
    kinds = [item["type"] for item in events[-1]["response"]["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]


async def test_a_cut_answer_is_incomplete(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "It is 42.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    response = await respond(service, max_output_tokens=4)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    events = await streamed(service, max_output_tokens=4)
    assert events[-1]["type"] == "response.incomplete"


async def test_a_conversation_comes_back(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    """What one response gave is the next one's input, as agents do."""
    use_script(monkeypatch, CALL)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    first = await respond(service, tools=[TOOL])
    (call,) = first["output"]
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "42"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "42.", "annotations": []}],
        },
        {"role": "user", "content": "Sure?"},
    ]
    assert (await respond(service, tools=[TOOL], input=history))["status"] == "completed"


async def test_formats_and_forced_calls(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"format": {"type": "json_schema", "name": "number", "schema": schema, "strict": True}}
    response = await respond(service, text=wanted, max_output_tokens=100)
    assert isinstance(json.loads(response["output"][0]["content"][0]["text"])["n"], int)
    assert response["text"]["format"]["name"] == "number"
    choice = {"type": "function", "name": "add"}
    tool = {**TOOL, "parameters": {**schema, "properties": {"n": {"type": "integer", "maximum": 99}}}}
    response = await respond(service, tools=[tool], tool_choice=choice, max_output_tokens=200)
    (call,) = response["output"]
    assert isinstance(json.loads(call["arguments"])["n"], int)
    assert response["tool_choice"] == choice


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call_output", "call_id": "none", "output": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": "hi " * 5000}, "input"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "wizard"}}}}, "text.format"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_400(make_service: ServiceFactory, tmp_path: Path, changes: dict, param: str):
    """The field is named as this API has it, not as chats do."""
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    answer = await service.post("/v1/responses", **{"input": "hi", **changes})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "completion_tokens" not in error["message"]
    assert (await service.post("/v1/responses", input="x", model="other")).status_code == 404
