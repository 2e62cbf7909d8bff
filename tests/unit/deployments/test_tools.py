"""Tools, reasoning and structured output over chat completions, without a socket."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from in_process import Service, ServiceFactory
from scripted_engine import LLAMA_TEMPLATE, THINK_TEMPLATE, TOOL_TEMPLATE, events_of, model_config, use_script

from deployments.api.openai.responses import ChatCompletion, ChatCompletionChunk

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get-time"}}
HI = [{"role": "user", "content": "hi"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


async def chat(service: Service, **fields):
    return await service.post("/v1/chat/completions", **{"messages": HI, "max_tokens": 300, **fields})


async def message_of(service: Service, **fields) -> tuple[dict, str]:
    response = await chat(service, **fields)
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.content, strict=True)
    choice = response.json()["choices"][0]
    return choice["message"], choice["finish_reason"]


async def streamed(service: Service, **fields) -> tuple[dict, str, list[dict]]:
    """A streamed answer put together as OpenAI's clients do, its finish reason, and the chunks."""
    response = await chat(service, stream=True, **fields)
    chunks = events_of(response.text)
    message: dict = {"role": None, "content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        message["role"] = delta.get("role", message["role"])
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        if choice["finish_reason"] is not None:
            reasons.append(choice["finish_reason"])
    assert len(reasons) == 1
    return message, reasons[0], chunks


async def test_a_call_the_model_decides_on(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, f"I shall look.\n{CALL}")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    message, reason = await message_of(service, tools=[WEATHER, CLOCK])
    assert reason == "tool_calls"
    assert message["content"] == "I shall look.\n"
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
    put_together, reason, chunks = await streamed(service, tools=[WEATHER, CLOCK], tool_choice="auto")
    assert (put_together["content"], reason) == ("I shall look.\n", "tool_calls")
    assert put_together["tool_calls"][0]["arguments"] == call["function"]["arguments"]
    pieces = [chunk for chunk in chunks if chunk["choices"][0]["delta"].get("tool_calls")]
    assert len(pieces) > 3, "arguments come as they are made"


async def test_without_tools_a_call_is_text(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, CALL)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message, reason = await message_of(service, **fields)
        assert (message["content"], reason) == (CALL, "stop")
        assert "tool_calls" not in message


async def test_llamas_format_is_found_by_the_template(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, '{"name": "get-time", "parameters": {}}; {"name": "get-time", "parameters": {"zone": 1}}')
    service = await make_service(model_config(tmp_path, LLAMA_TEMPLATE))
    message, reason = await message_of(service, tools=[CLOCK])
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ["{}", '{"zone": 1}']
    assert (message["content"], reason) == (None, "tool_calls")


async def test_log_probabilities_are_kept_beside_calls(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, CALL)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    _, _, chunks = await streamed(service, tools=[WEATHER], logprobs=True)
    entries = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert sum(len(entry["content"]) for entry in entries) == len(CALL)


async def test_thoughts_are_split_off(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "Is it 4?\n</think>\n\nIt is 4.")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    message, _ = await message_of(service)
    assert (message["reasoning_content"], message["content"]) == ("Is it 4?\n", "It is 4.")
    put_together, _, _ = await streamed(service)
    assert (put_together["reasoning_content"], put_together["content"]) == ("Is it 4?\n", "It is 4.")


@pytest.mark.parametrize("fields", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
async def test_thinking_can_be_turned_off(make_service: ServiceFactory, monkeypatch, tmp_path: Path, fields: dict):
    use_script(monkeypatch, "It is 4.")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    message, _ = await message_of(service, **fields)
    assert message["content"] == "It is 4."
    assert "reasoning_content" not in message


async def test_parsers_can_be_turned_off(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "Hm.</think>Yes.")
    config = model_config(tmp_path, THINK_TEMPLATE, reasoning_parser="none", tool_parser="none")
    service = await make_service(config)
    message, _ = await message_of(service)
    assert message["content"] == "Hm.</think>Yes."
    assert (await chat(service, tools=[CLOCK])).json()["error"]["param"] == "tools"


async def test_a_conversation_with_calls_reaches_the_template(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    call = {"id": "c1", "type": "function", "function": {"name": "get-time", "arguments": '{"zone": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    response = await service.post("/tokenize", messages=messages, add_generation_prompt=False)
    text = bytes(response.json()["tokens"]).decode()
    assert text == 'user: hiassistant: <tool_call>get-time {"zone": 1}</tool_call>tool: noon'
    assert (await chat(service, messages=messages, max_tokens=3)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "magic", "function": {"name": "a"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1025)]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "must"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": 5}}}}}],
          "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [*HI, {"role": "tool", "tool_call_id": "none", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "wizard"}}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "http://x/y"}}}},
         "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"guided_regex": "(["}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"structured_outputs": {"regex": "(["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs.json_object"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
async def test_wrong_tools_and_formats_are_400(make_service: ServiceFactory, tmp_path: Path, changes: dict, param: str):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    response = await chat(service, **changes)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.fixture
async def real(make_service: ServiceFactory, tmp_path: Path) -> Service:
    """The demo model itself."""
    return await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))


async def test_a_named_tool_is_called(real: Service):
    choice = {"type": "function", "function": {"name": "get_weather"}}
    for temperature in (0, 1):
        fields = {"tools": [CLOCK, WEATHER], "tool_choice": choice, "temperature": temperature, "seed": 1}
        message, reason = await message_of(real, **fields)
        (call,) = message["tool_calls"]
        assert (call["function"]["name"], message["content"], reason) == ("get_weather", None, "tool_calls")
        jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
        put_together, _, _ = await streamed(real, **fields)
        assert put_together["tool_calls"][0]["arguments"] == call["function"]["arguments"]


async def test_some_tool_is_called(real: Service):
    only = {**WEATHER["function"]["parameters"]}
    for seed in range(3):
        fields = {"tools": [WEATHER], "tool_choice": "required", "seed": seed, "temperature": 1, "max_tokens": 600}
        message, reason = await message_of(real, **fields, parallel_tool_calls=False)
        (call,) = message["tool_calls"]
        assert reason == "tool_calls"
        jsonschema.validate(json.loads(call["function"]["arguments"]), only)


async def test_response_formats_and_guides(real: Service):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    for fields in ({"response_format": wanted}, {"guided_json": schema}, {"guided_json": json.dumps(schema)}):
        message, reason = await message_of(real, temperature=1, seed=3, **fields)
        jsonschema.validate(json.loads(message["content"]), schema)
        assert reason == "stop"
    assert re.fullmatch("[a-f]{4}", (await message_of(real, guided_regex="[a-f]{4}"))[0]["content"])
    assert (await message_of(real, guided_choice=["yes", "no"]))[0]["content"] in ("yes", "no")
    newer = {"structured_outputs": {"choice": ["maybe"]}}
    assert (await message_of(real, **newer))[0]["content"] == "maybe"
    message, _ = await message_of(real, structured_outputs={"json": schema}, temperature=0)
    jsonschema.validate(json.loads(message["content"]), schema)
    lark = 'start: "<" /[a-z]{2}/ ">"'
    assert re.fullmatch("<[a-z]{2}>", (await message_of(real, guided_grammar=lark))[0]["content"])
    response = await real.post("/v1/completions", prompt="17 + 25 =", guided_regex=" ?[0-9]{2}", temperature=0)
    assert re.fullmatch(" ?[0-9]{2}", response.json()["choices"][0]["text"])


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": {"type": "object", "required": ["a"]}},
        {"type": "json_schema", "name": "x", "schema": {"type": "object", "required": ["a"]}},
    ],
)
async def test_schemas_as_other_servers_write_them(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path, response_format: dict
):
    """llama.cpp, Together and Fireworks put the schema beside the type."""
    use_script(monkeypatch, '{"b":1}')
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    answer = await service.post("/v1/chat/completions", **chat, response_format=response_format)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "(does not fit the grammar)"
    for wrong in ({"type": "text"}, {"type": "json_schema", "json_schema": {"schema": {}}}):
        answer = await service.post("/v1/chat/completions", **chat, response_format={"schema": {}, **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format.schema")
