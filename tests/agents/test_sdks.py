"""Other people's Python clients: a call, then its result with everything that the client echoes."""

import json
from typing import Any

import agents as agents_sdk
import anthropic
import litellm
import openai
import pytest
from agent_server import KEY, AgentServer
from agents import Agent, Runner, function_tool
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from scripted_model import CONTEXT, called

QUESTION = {"role": "user", "content": "What is 17 + 25?"}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": PARAMETERS}}
RESPONSES_TOOL = {"type": "function", "name": "add", "description": "Adds", "parameters": PARAMETERS, "strict": False}
ANTHROPIC_TOOL = {"name": "add", "description": "Adds", "input_schema": PARAMETERS}
CHAT = {"model": "demo", "tools": [TOOL], "messages": [QUESTION]}
CALL = "I add.\n" + called("add", a=17, b=25)


def use_tool(prompt: str) -> str:
    """Calls `add`, then says what came out."""
    return "It is 42." if "<tool_response>42</tool_response>" in prompt else CALL


@pytest.fixture
def url(server: AgentServer) -> str:
    """Where a model is that calls `add`."""
    server.model.follow(use_tool)
    return server.url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def check_history(server: AgentServer) -> None:
    """The model was told what it had said and called itself, as it had written it."""
    first, second = server.model.prompts
    assert second.startswith(first + CALL)


def merged(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Streamed deltas put together by someone who knows nothing of their fields."""
    message: dict[str, Any] = {}
    for delta in deltas:
        for key, value in delta.items():
            if key == "tool_calls" and value:
                calls = message[key] = message.get(key) or []
                for piece in value:
                    if piece["index"] == len(calls):
                        calls.append(piece)
                    else:
                        calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            elif isinstance(value, str) and isinstance(message.get(key), str) and key != "role":
                message[key] += value
            elif value is not None or key not in message:
                message[key] = value
    return message


def test_openai_chats_echo_whole_messages(server: AgentServer, client: openai.OpenAI):
    message = client.chat.completions.create(**CHAT).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    answer = client.chat.completions.create(**CHAT | {"messages": [QUESTION, message.model_dump(), result]})
    assert answer.choices[0].message.content == "It is 42."
    check_history(server)


def test_openai_chats_echo_streamed_deltas(server: AgentServer, client: openai.OpenAI):
    chunks = client.chat.completions.create(**CHAT, stream=True)
    message = merged([chunk.choices[0].delta.model_dump() for chunk in chunks])
    assert message["tool_calls"][0]["index"] == 0
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"}
    answer = client.chat.completions.create(**CHAT | {"messages": [QUESTION, message, result]})
    assert answer.choices[0].message.content == "It is 42."
    check_history(server)


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_responses_echo_their_items(server: AgentServer, client: openai.OpenAI, streamed: bool):
    asked = {"model": "demo", "tools": [RESPONSES_TOOL]}
    if streamed:
        with client.responses.stream(input=[QUESTION], **asked) as stream:
            items = [event.item for event in stream if event.type == "response.output_item.done"]
    else:
        items = client.responses.create(input=[QUESTION], **asked).output
    assert [item.type for item in items] == ["message", "function_call"]
    result = {"type": "function_call_output", "call_id": items[1].call_id, "output": "42"}
    answer = client.responses.create(input=[QUESTION, *(item.model_dump() for item in items), result], **asked)
    assert answer.output_text == "It is 42."
    check_history(server)


def test_openai_responses_go_on_from_the_last(server: AgentServer, client: openai.OpenAI):
    asked = {"model": "demo", "tools": [RESPONSES_TOOL]}
    first = client.responses.create(input=[QUESTION], **asked)
    result = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "42"}
    answer = client.responses.create(input=[result], previous_response_id=first.id, **asked)
    assert answer.output_text == "It is 42."
    check_history(server)


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropic_messages_echo_their_blocks(server: AgentServer, url: str, streamed: bool):
    messages = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0).messages
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 500, "tools": [ANTHROPIC_TOOL]}
    if streamed:
        with messages.stream(messages=[QUESTION], **asked) as stream:
            message = stream.get_final_message()
    else:
        message = messages.create(messages=[QUESTION], **asked)
    assert (message.stop_reason, message.content[1].input) == ("tool_use", {"a": 17, "b": 25})
    result = {"type": "tool_result", "tool_use_id": message.content[1].id, "content": [{"type": "text", "text": "42"}]}
    turns = [QUESTION, message.model_dump(include={"role", "content"}), {"role": "user", "content": [result]}]
    assert messages.create(messages=turns, **asked).content[0].text == "It is 42."
    check_history(server)


def test_anthropic_runs_tools_itself(url: str):
    @anthropic.beta_tool
    def add(a: int, b: int) -> str:
        """Adds."""
        return str(a + b)

    client = anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)
    runner = client.beta.messages.tool_runner(
        model="demo", max_tokens=500, tools=[add], messages=[QUESTION], betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
    )  # fmt: skip
    assert runner.until_done().content[0].text == "It is 42."


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("streamed", [False, True])
def test_litellm_echoes_messages(url: str, provider: str, streamed: bool):
    base = f"{url}/v1" if provider == "openai" else url
    asked: dict[str, Any] = {
        "model": f"{provider}/demo", "api_base": base, "api_key": KEY, "tools": [TOOL], "max_retries": 0
    }  # fmt: skip
    answer = litellm.completion(messages=[QUESTION], stream=streamed, **asked)
    if streamed:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"a": 17, "b": 25}
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "42"}
    answer = litellm.completion(messages=[QUESTION, message.model_dump(), result], **asked)
    assert answer.choices[0].message.content == "It is 42."


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm_knows_an_overlong_prompt(url: str, provider: str):
    base = f"{url}/v1" if provider == "openai" else url
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            model=f"{provider}/demo", api_base=base, api_key=KEY, max_retries=0,
            messages=[{"role": "user", "content": "x" * CONTEXT}],
        )  # fmt: skip


@pytest.mark.parametrize("api", ["chats", "responses"])
@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_echoes_messages(server: AgentServer, url: str, api: str, streamed: bool):
    model = ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key=KEY, max_retries=0, use_responses_api=api == "responses"
    ).bind_tools([TOOL])
    turns: list[Any] = [HumanMessage("What is 17 + 25?")]
    message = sum(model.stream(turns), start=AIMessageChunk("")) if streamed else model.invoke(turns)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("add", {"a": 17, "b": 25})
    answer = model.invoke([*turns, message, ToolMessage("42", tool_call_id=call["id"])])
    assert answer.text == "It is 42."
    check_history(server)


@pytest.mark.parametrize("model_class", [agents_sdk.OpenAIChatCompletionsModel, agents_sdk.OpenAIResponsesModel])
@pytest.mark.parametrize("streamed", [False, True])
async def test_openai_agents_run_tools(server: AgentServer, url: str, model_class: type, streamed: bool):
    @function_tool
    def add(a: int, b: int) -> str:
        """Adds."""
        return str(a + b)

    agents_sdk.set_tracing_disabled(True)  # it would report to another server
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        agent = Agent(name="Adder", instructions="You add.", tools=[add], model=model_class("demo", client))
        if streamed:
            run = Runner.run_streamed(agent, "What is 17 + 25?")
            async for _ in run.stream_events():
                pass
        else:
            run = await Runner.run(agent, "What is 17 + 25?")
        assert run.final_output == "It is 42."
        again = await Runner.run(agent, [*run.to_input_list(), {"role": "user", "content": "Are you sure?"}])
        assert again.final_output == "It is 42."
