"""OpenAI's Responses API without a socket; the client's own types say whether events are well formed."""

import json
import re
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.api.openai.response_requests import ResponsesRequest
from deployments.api.openai.response_tools import FunctionId
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


SEARCH = {"type": "namespace", "name": "mcp__files", "description": "Files.",
          "tools": [{"type": "function", "name": "find", "parameters": {"type": "object", "properties": {}}},
                    {"type": "grammar", "name": "raw"}]}  # fmt: skip


async def test_tools_of_other_kinds_are_named_and_left_out(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "Hi.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    others = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch", "format": {"type": "text"}},
              {"type": "local_shell"}, {"type": "mcp", "server_label": "a", "server_url": "http://x"},
              {"type": "image_generation"}, {"type": "made_up_tomorrow"}]  # fmt: skip
    answer = await service.post("/v1/responses", input="hi", tools=[TOOL, *others, SEARCH], client_metadata={"a": "b"})
    assert answer.status_code == 200, answer.text
    Response.model_validate_json(answer.content, strict=True)
    ignored = answer.headers["x-rayline-ignored"].split(", ")
    assert {f"tools[{i}].type" for i in range(1, 7)} | {"tools[7].tools[1].type", "client_metadata"} <= set(ignored)
    alone = await respond(service, tools=[TOOL, SEARCH])
    num_tokens = [response["usage"]["input_tokens"] for response in (answer.json(), alone)]
    assert num_tokens[0] == num_tokens[1], "the model is not told of them"
    assert [tool["type"] for tool in answer.json()["tools"]] == ["function", "namespace"]
    only = await respond(service, tools=others, tool_choice="auto")
    assert only["status"] == "completed"
    (tmp_path / "strict").mkdir()
    strict = await make_service(model_config(tmp_path / "strict", TOOL_TEMPLATE, strict_fields=True))
    refused = await strict.post("/v1/responses", input="hi", tools=others)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools[0]")


@pytest.mark.parametrize("called", ["mcp__files__find", "find"])
async def test_functions_of_a_namespace(make_service: ServiceFactory, monkeypatch, tmp_path: Path, called: str):
    """The model is told of them; a call comes back with name and namespace apart, and is understood as history."""
    use_script(monkeypatch, f'<tool_call>{{"name": "{called}", "arguments": {{}}}}</tool_call>')
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    response = await respond(service, tools=[SEARCH])
    (call,) = response["output"]
    assert (call["name"], call["namespace"]) == ("find", "mcp__files")
    events = await streamed(service, tools=[SEARCH])
    added = next(event["item"] for event in events if event["type"] == "response.output_item.added")
    assert (added["name"], added["namespace"]) == ("find", "mcp__files")
    history = [{"role": "user", "content": "hi"}, call,
               {"type": "function_call_output", "call_id": call["call_id"], "output": "a.txt"}]  # fmt: skip
    turns = ResponsesRequest.model_validate({"model": "demo", "input": history}).to_chat().messages
    assert turns[1].tool_calls[0].function.name == "mcp__files__find"


async def test_the_choice_of_a_function_in_a_namespace(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    tool = {
        **SEARCH,
        "tools": [{**SEARCH["tools"][0], "parameters": {"type": "object", "additionalProperties": False}}],
    }
    choices = [
        {"type": "function", "name": "find", "namespace": "mcp__files"},
        {"type": "function", "name": "find"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "find"}]},
    ]
    for choice in choices:
        response = await respond(service, tools=[TOOL, tool], tool_choice=choice, max_output_tokens=100)
        assert (response["output"][0]["name"], response["output"][0]["namespace"]) == ("find", "mcp__files"), choice
        assert response["tool_choice"] == choice


@pytest.mark.parametrize(
    ("names", "chat_name"),
    [
        (("find", None), "find"),
        (("find", "files"), "files__find"),
        (("find", "mcp__files__"), "mcp__files__find"),
        (("find", "my files.v2"), "my_files_v2__find"),
    ],
)
def test_what_the_model_calls_a_function(names: tuple[str, str | None], chat_name: str):
    assert FunctionId(*names).chat_name == chat_name


def test_long_names_are_shortened_and_stay_apart():
    long = [FunctionId("f" * 80 + end, "n" * 80).chat_name for end in "ab"]
    assert len({*long}) == 2
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{128}", name) for name in long)


async def test_items_of_other_kinds(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    """Calls and their results are told as such, whatever they were calls of; the rest is left out and named."""
    use_script(monkeypatch, "Done.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    history = [
        {"role": "user", "content": "go"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        {"type": "local_shell_call", "call_id": "c2", "action": {"command": ["ls"]}, "status": "completed"},
        {"type": "local_shell_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "a.txt"}, {"type": "input_image", "image_url": "data:,"}]},
        {"type": "compaction", "encrypted_content": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": "more"}]},
    ]  # fmt: skip
    answer = await service.post("/v1/responses", input=history)
    assert answer.status_code == 200, answer.text
    assert set(answer.headers["x-rayline-ignored"].split(", ")) == {"input[1].type", "input[6].type"}
    turns = ResponsesRequest.model_validate({"model": "demo", "input": history}).to_chat().messages
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant", "tool", "user"]
    calls = [turn.tool_calls[0].function for turn in turns if turn.tool_calls]
    assert [call.name for call in calls] == ["apply_patch", "local_shell"]
    assert json.loads(calls[0].arguments) == {"input": "*** Begin Patch"}
    assert json.loads(calls[1].arguments)["action"]["command"] == ["ls"]
    assert [turn.content for turn in turns if turn.role == "tool"] == ["ok", "a.txt\n[image]"]


def turns_of(*items: dict) -> list[dict]:
    chat = ResponsesRequest.model_validate({"model": "demo", "input": list(items)}).to_chat()
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def thought(text: str) -> dict:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def test_reasoning_may_stand_anywhere():
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "1"}
    assert [turn["role"] for turn in turns_of(thought("a"), user, thought("b"))] == ["user"]
    (_, turn) = turns_of(user, thought("a"), thought("b"), said)
    assert (turn["reasoning_content"], turn["content"]) == ("a\nb", "yes")
    (_, turn, _) = turns_of(user, said, thought("a"), call, thought("b"), result)
    assert (turn["reasoning_content"], turn["content"], len(turn["tool_calls"])) == ("a", "yes", 1)
    (_, one, two) = turns_of(user, said, thought("a"), said)
    assert "reasoning_content" not in one
    assert two["reasoning_content"] == "a"


async def test_thoughts_survive_a_client_without_memory(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    """It gives back of a reasoning item what Codex does: summary and encrypted content."""
    use_script(monkeypatch, "Add é: them.</think>42.")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    fields = {"store": False, "include": ["reasoning.encrypted_content"]}
    thoughts, text = (await respond(service, **fields))["output"]
    assert (await streamed(service, **fields))[-1]["response"]["output"][0]["encrypted_content"]
    back = {"type": "reasoning", "id": thoughts["id"], "summary": [], "content": None,
            "encrypted_content": thoughts["encrypted_content"]}  # fmt: skip
    (_, turn) = turns_of({"role": "user", "content": "hi"}, back, text)
    assert turn["reasoning_content"] == "Add é: them."
    foreign = {**back, "encrypted_content": "gAAAAAB", "summary": [{"type": "summary_text", "text": "It adds."}]}
    (_, turn) = turns_of({"role": "user", "content": "hi"}, foreign, text)
    assert turn["reasoning_content"] == "It adds."
    assert "encrypted_content" not in (await respond(service))["output"][0]


@pytest.mark.parametrize(
    "fields", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 1}], ids=["include", "top_logprobs"]
)
async def test_log_probabilities_of_the_text(make_service: ServiceFactory, monkeypatch, tmp_path: Path, fields: dict):
    """Of the tokens of the text alone, thoughts and markup left out."""
    thoughts = "A né! so.</think>"
    use_script(monkeypatch, f"{thoughts}né!{CALL}")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    response = await respond(service, tools=[TOOL], **fields)
    (part,) = response["output"][1]["content"]
    assert part["text"] == "né!"
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]) == "né!".encode()
    places = [-entry["logprob"] - len(thoughts.encode()) for entry in part["logprobs"]]
    assert places == [1, 2, 3, 4], "the script's engine gives each token its number"
    events = await streamed(service, tools=[TOOL], **fields)
    deltas = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert deltas == done["logprobs"] == part["logprobs"]
    (part,) = (await respond(service, tools=[TOOL]))["output"][1]["content"]
    assert part["logprobs"] == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
         "input[0].content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call_output", "call_id": "none", "output": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}]}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": "hi " * 5000}, "input"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [{"type": "web_search"}, TOOL, {**SEARCH, "tools": [{**TOOL, "parameters": {"type": "string"}}]}]},
         "tools[2].tools[0].parameters"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "wizard"}}}}, "text.format"),
        ({"max_output_tokens": 10**10}, "max_output_tokens"),
        ({"tools": [{"name": "a"}]}, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto",
                                           "tools": [{"type": "function", "name": "other"}]}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": {"type": "function", "name": "other"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
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
