"""Requests of the shapes that coding agents send, as recorded of Claude Code 2.1 and Codex 0.171, in words of our own.

tests/agents runs the agents themselves; these say what of their requests reaches the model.
"""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process import Service, ServiceFactory
from scripted_model import ScriptedModel, called, scripted_model, told_name

Start = Callable[[], Awaitable[tuple[Service, ScriptedModel]]]

SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "command": {"type": "string", "description": "what to run", "maxLength": 524288},
        "timeout": {"type": "number", "exclusiveMinimum": 0},
        "env": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}},
        "where": {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}]},
    },
    "required": ["command"],
    "additionalProperties": False,
}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
CALL = called("Bash", command="ls")
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
PNG = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def start(make_service: ServiceFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a service of a scripted model; its template takes a system message in front only."""

    async def start() -> tuple[Service, ScriptedModel]:
        config, model = scripted_model(tmp_path, monkeypatch)
        service = await make_service(config)
        model.follow(lambda _: "Well.")
        return service, model

    return start


def text(content: str, **more: object) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def claude_code(*turns: dict[str, Any], session: str = "ae9", first: bool = True) -> dict[str, Any]:
    """A request of Claude Code's: the user's words, what it says of the surroundings, then `turns`."""
    surroundings: Any = "You are in /work."
    if first:  # later it comes as a string
        surroundings = [text(surroundings, **EPHEMERAL)]
    return {
        "system": [
            text(f"x-anthropic-billing-header: cc_version=2.1.332.{session}; cc_entrypoint=cli;"),
            text("You are an agent.", **EPHEMERAL),
            text("\nUse your tools.", **EPHEMERAL),
        ],
        "messages": [
            {"role": "user", "content": [text("<reminder>Be brief.</reminder>"), text("List the files.")]},
            {"role": "system", "content": surroundings},
            *turns,
        ],
        "tools": [
            {"name": "Bash", "description": "Runs", "input_schema": SCHEMA, "input_examples": [{}], **EPHEMERAL},
            {"name": f"mcp__{'x' * 100}", "input_schema": {"type": "object", "properties": {}}, "defer_loading": True},
        ],
        "metadata": {"user_id": '{"device_id":"0","session_id":"1"}'},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive", "display": "updates"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }  # fmt: skip


def claude_code_result(content: Any, **more: object) -> list[dict[str, Any]]:
    """The call, and what came of it."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}, "caller": None, **EPHEMERAL}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **EPHEMERAL, **more}
    return [{"role": "assistant", "content": [text("Let me see."), use]}, {"role": "user", "content": [result]}]


async def message(service: Service, body: dict[str, Any]) -> httpx.Response:
    """The answer of `/v1/messages`, with the query and the headers that Claude Code sends."""
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "context-management-2025-06-27,effort-2025-11-24"}
    answer = await service.http.post("/v1/messages?beta=true", json={"model": "demo", **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def test_claude_code_asks_and_brings_a_result(start: Start):
    service, model = await start()
    model.follow(lambda prompt: "a.txt" if "<tool_response>" in prompt else "Let me see." + CALL)
    called_for = (await message(service, claude_code())).json()
    assert [block["type"] for block in called_for["content"]] == ["text", "tool_use"]
    answer = await message(service, claude_code(*claude_code_result("a.txt", is_error=False), first=False))
    assert answer.json()["content"] == [text("a.txt")]
    first, second = model.prompts
    assert second == first + "Let me see." + CALL + "<tool_response>a.txt</tool_response>"
    assert answer.json()["usage"]["cache_read_input_tokens"] >= len(first) - 16


async def test_claude_code_system_prompts_all_reach_the_model(start: Start):
    service, model = await start()
    await message(service, claude_code())
    (prompt,) = model.prompts
    for told in (
        "You are an agent.",
        "Use your tools.",
        "You are in /work.",
        "Be brief.",
        "List the files.",
        "mcp__xx",
    ):
        assert told in prompt


async def test_claude_code_sessions_share_their_prompt(start: Start):
    """The line that its maker bills by differs in each session, and would keep the prefix cache from finding any."""
    service, model = await start()
    for session in ("ae9", "34c"):
        await message(service, claude_code(session=session))
    assert model.prompts[0] == model.prompts[1]
    assert "billing" not in model.prompts[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([IMAGE], "image"),
        ([text("two files"), IMAGE], "two files"),
        ([{"type": "tool_reference", "tool_name": "WebFetch"}], "WebFetch"),
        ([], "<tool_response></tool_response>"),
        (None, "<tool_response></tool_response>"),
    ],
)
async def test_claude_code_results_that_are_no_text(start: Start, content: Any, told: str):
    service, model = await start()
    await message(service, claude_code(*claude_code_result(content)))
    assert told in model.prompts[0].partition(CALL)[2]


async def test_claude_code_searches_the_web(start: Start):
    """The one tool is run by its maker's server: here the model answers without."""
    service, model = await start()
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    body = {"messages": [{"role": "user", "content": "Search for x."}], "max_tokens": 100, "tools": [search]}
    await message(service, {**body, "tool_choice": {"type": "auto"}})
    assert model.prompts == ["Search for x."]


async def test_claude_code_counts_before_it_asks(start: Start):
    service, _ = await start()
    counted = await service.post("/v1/messages/count_tokens?beta=true", **claude_code())
    usage = (await message(service, claude_code())).json()["usage"]
    assert counted.json()["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


async def test_claude_code_asks_for_more_than_fits(start: Start):
    """It does not know the context, so what the answer may have is what is left of it."""
    service, _ = await start()
    await message(service, {**claude_code(), "max_tokens": 10**6})


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_anthropics_clients_learn_that_no_conversation_is_kept(start: Start, thread: dict[str, str]):
    """They ask for it unasked, and from then on bring only what is new, unless this code tells them not to."""
    service, _ = await start()
    answer = await service.post(
        "/v1/messages", messages=[{"role": "user", "content": "hi"}], max_tokens=5, thread=thread
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert "thread" in answer.json()["error"]["message"]


FUNCTION = {"type": "function", "name": "exec_command", "description": "Runs", "strict": False, "parameters": SCHEMA}
SPAWN = {"type": "function", "name": "spawn_agent", "strict": False, "parameters": {"type": "object", "properties": {}}}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
OTHER_TOOLS = [
    {"type": "web_search", "external_web_access": True, "search_content_types": ["text", "image"]},
    {"type": "custom", "name": "apply_patch", "description": "Edits", "format": GRAMMAR},
    {"type": "tool_search", "execution": "client", "description": "Finds tools", "parameters": {"type": "object"}},
]
EXEC = called("exec_command", command="ls")


def codex(*items: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A request of Codex's: two messages of the developer, two of the user, then `items`."""

    def said(role: str, *texts: str) -> dict[str, Any]:
        parts = [{"type": "input_text", "text": part} for part in texts]
        return {"type": "message", "id": f"msg_{role}_{texts[0][:3]}", "role": role, "content": parts}

    return {
        "input": [
            said("developer", "You are a coding agent."),
            said("developer", "<skills>None.</skills>", "<permissions>All.</permissions>"),
            said("user", "<environment>/work</environment>"),
            said("user", "List the files."),
            *items,
        ],
        "tools": [
            FUNCTION,
            {"type": "namespace", "name": "agents_v1", "description": "Sub-agents", "tools": [SPAWN]},
            *OTHER_TOOLS,
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
        "text": {"verbosity": "low"},
        "client_metadata": {"session_id": "0", "turn_id": "1"},
        **changes,
    }


async def response(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """The last event of `/v1/responses` as a stream; each item was added and finished with the same fields."""
    answer = await service.http.post("/v1/responses", json={"model": "demo", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["type"] == "response.completed"
    output = events[-1]["response"]["output"]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == output
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    for before, after in zip(added, output, strict=True):
        assert before.keys() == after.keys()
        assert before.get("namespace") == after.get("namespace")
    return events[-1]["response"]


async def test_codex_asks_and_brings_a_result(start: Start):
    service, model = await start()
    model.follow(lambda prompt: "a.txt" if "<tool_response>" in prompt else "<think>Hm.</think>Let me see." + EXEC)
    items = (await response(service, codex()))["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "id": "fco_1", "call_id": items[2]["call_id"], "output": "a.txt"}
    answer = await response(service, codex(*items, result))
    assert answer["output"][0]["content"][0]["text"] == "a.txt"
    first, second = model.prompts
    assert second == first + "<think>Hm.</think>Let me see." + EXEC + "<tool_response>a.txt</tool_response>"
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] >= len(first) - 16


async def test_codex_messages_all_reach_the_model(start: Start):
    service, model = await start()
    await response(service, codex())
    (prompt,) = model.prompts
    for told in ("You are a coding agent.", "<skills>None.</skills>", "All.", "<environment>", "List the files."):
        assert told in prompt
    assert "exec_command" in prompt
    assert "spawn_agent" in prompt


async def test_codex_functions_keep_their_namespace(start: Start):
    """The model sees one list of functions; Codex finds a function by its namespace and name."""
    service, model = await start()

    def delegate(prompt: str) -> str:
        return "Done." if "<tool_response>" in prompt else called(told_name(prompt, "spawn_agent"), message="Go.")

    model.follow(delegate)
    (item,) = (await response(service, codex()))["output"]
    assert (item["namespace"], item["name"], item["arguments"]) == ("agents_v1", "spawn_agent", '{"message": "Go."}')
    result = {"type": "function_call_output", "call_id": item["call_id"], "output": "{}"}
    await response(service, codex(item, result))
    first, second = model.prompts
    assert second == first + delegate(first) + "<tool_response>{}</tool_response>"


async def test_codex_sums_up_without_tools(start: Start):
    """The conversation has calls, of tools that this request does not have."""
    service, model = await start()
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "exec_command", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "a.txt"}
    await response(service, codex(call, result, tools=[]))
    assert "a.txt" in model.prompts[0]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ([{"type": "input_image", "image_url": PNG, "detail": "high"}], "image"),
        ([{"type": "input_text", "text": "two files"}, {"type": "input_image", "image_url": PNG}], "two files"),
        ([], "<tool_response></tool_response>"),
    ],
)
async def test_codex_results_that_are_no_text(start: Start, output: list[Any], told: str):
    service, model = await start()
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "gues", "arguments": "{"}
    await response(service, codex(call, {"type": "function_call_output", "call_id": "call_1", "output": output}))
    assert told in model.prompts[0]


async def test_codex_pictures_of_the_user_are_refused_by_name(start: Start):
    service, model = await start()
    picture = {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": PNG}]}
    answer = await service.http.post("/v1/responses", json={"model": "demo", **codex(picture)})
    assert answer.status_code == 400
    assert "image" in answer.json()["error"]["message"]
    assert not model.prompts
