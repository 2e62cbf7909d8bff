"""What clients of OpenAI's Responses API send beside the plain fields."""

import json
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from openai.types.responses import Response
from pydantic import TypeAdapter
from scripted_engine import TOOL_TEMPLATE, model_config, use_script
from scripted_model import scripted_model

from deployments.api.openai.response_requests import ResponsesRequest
from deployments.chat.errors import APIError

PATH = "/v1/responses"
F = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "hi"}


def turns_of(*items: dict) -> list[dict]:
    request = ResponsesRequest.model_validate({"model": "demo", "input": [USER, *items]})
    return [message.turn() for message in request.to_chat().messages]


async def text_of(service: Service, **fields: object) -> str:
    answer = await service.post(PATH, input="hi", **fields)
    assert answer.status_code == 200, answer.text
    TypeAdapter(Response).validate_python(answer.json())
    return answer.json()["output"][0]["content"][0]["text"]


async def test_sampling_is_that_of_chats(make_service: ServiceFactory, tmp_path: Path):
    """Fields of chats that OpenAI's own Responses API lacks, as vLLM has them: none is ignored."""
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"))
    plain = {"max_output_tokens": 12, "temperature": 1.5}
    seeded = await text_of(service, seed=7, **plain)
    assert seeded == await text_of(service, seed=7, **plain)
    chat = await service.post("/v1/chat/completions", messages=[USER], seed=7, max_tokens=12, temperature=1.5)
    assert chat.json()["choices"][0]["message"]["content"] == seeded
    greedy = await text_of(service, max_output_tokens=12, temperature=0)
    assert greedy == await text_of(service, top_k=1, **plain)
    assert await text_of(service, stop=greedy[3:5], max_output_tokens=12, temperature=0) == greedy[:3]
    biased = await text_of(service, logit_bias={"65": 100}, max_output_tokens=3, temperature=0)
    assert biased == "AAA"
    answer = await service.post(PATH, input="hi", top_k=-5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_k")


async def test_template_variables(make_service: ServiceFactory, tmp_path: Path, monkeypatch):
    template = "{{ messages[0].content }} {{ mood | default('none') }} {{ enable_thinking | default('unset') }}"
    config, model = scripted_model(tmp_path, monkeypatch, template)
    service = await make_service(config)
    await text_of(service, chat_template_kwargs={"mood": "glad", "enable_thinking": False})
    assert model.prompts[-1].endswith("hi glad False")


async def test_what_came_of_a_local_shell_is_told(make_service: ServiceFactory):
    """OpenAI's own form: the output has the call's id as its `id`."""
    call = {"type": "local_shell_call", "id": "ls_1", "call_id": "call_1", "status": "completed",
            "action": {"type": "exec", "command": ["ls"], "env": {}}}  # fmt: skip
    for output_id in ("call_1", "ls_1"):
        turns = turns_of(call, {"type": "local_shell_call_output", "id": output_id, "output": "a.txt"})
        assert turns[2] == {"role": "tool", "tool_call_id": "call_1", "content": "a.txt"}
    with pytest.raises(APIError, match="'other'"):
        turns_of(call, {"type": "local_shell_call_output", "id": "other", "output": "a.txt"})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"status": "failed", "output": "no such file"}, "[error]\nno such file"),
        ({"status": "failed"}, "[error]"),
        ({"status": "completed"}, "completed"),
        ({"status": "completed", "output": "done"}, "done"),
        ({}, ""),
    ],
)
def test_whether_a_patch_was_applied_is_told(fields: dict, told: str):
    call = {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "x"}}
    assert turns_of(call, {"type": "apply_patch_call_output", "call_id": "c", **fields})[2]["content"] == told


async def test_allowed_tools_of_other_kinds_are_left_out(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "ok")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    tools = [F, {"type": "mcp", "server_label": "a"}]

    def allowed(*names: dict) -> dict:
        return {"type": "allowed_tools", "mode": "auto", "tools": list(names)}

    chosen = allowed({"type": "mcp", "server_label": "a"}, {"type": "function", "name": "f"})
    answer = await service.post(PATH, input="hi", tools=tools, tool_choice=chosen)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-rayline-ignored"] == "tools[1].type", "the first of its kind"
    TypeAdapter(Response).validate_python(answer.json())
    answer = await service.post(
        PATH, input="hi", tools=tools, tool_choice=allowed({"type": "mcp", "server_label": "a"})
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tool_choice")


async def test_a_schema_needs_no_name(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, '{"a":1}')
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    text = await text_of(service, text={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(text) == {"a": 1}
    answer = await service.post(PATH, input="hi", text={"format": {"type": "json_schema", "name": "x"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text.format.schema")


async def test_no_previous_response_may_be_empty(make_service: ServiceFactory):
    service = await make_service()
    answer = await service.post(PATH, input="hi", previous_response_id="", max_output_tokens=2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["previous_response_id"] is None


async def test_asking_for_a_summary_is_refused(make_service: ServiceFactory):
    service = await make_service()
    answer = await service.post(PATH, input=[USER, {"type": "compaction_trigger"}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "compaction_trigger" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (PATH, {"input": [USER, {"type": "function_call_output", "call_id": "call_9", "output": "x"}]}),
        ("/v1/chat/completions", {"messages": [USER, {"role": "tool", "tool_call_id": "call_9", "content": "x"}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_9", "content": "x"}]}]}),
    ],
)  # fmt: skip
async def test_a_result_without_a_call_is_named(make_service: ServiceFactory, path: str, fields: dict):
    service = await make_service()
    answer = await service.post(path, **fields)
    assert answer.status_code == 400
    assert "'call_9'" in answer.json()["error"]["message"]
