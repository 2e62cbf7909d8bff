"""Claude Code, the real one, against the server."""

import json

import pytest
from agent_server import KEY, AgentServer
from command_lines import Agents, Run
from png import write_png
from scripted_model import CONTEXT, called

QUESTION = "What is 17 + 25?"
SHELL_CALL = called("Bash", command="echo nineteen-$((17 + 25))", description="Adds")


def use_shell(prompt: str) -> str:
    """Calls the shell for a sum, then says what came out."""
    return "It is 42." if "nineteen-42" in prompt else "I shall ask the shell.\n" + SHELL_CALL


def blocks(run: Run) -> list[dict]:
    """What the model said, as Claude Code understood it."""
    return [block for event in run.of_type("assistant") for block in event["message"]["content"]]


def results(run: Run) -> list[dict]:
    """What its tools answered."""
    content = [block for event in run.of_type("user") for block in event["message"]["content"]]
    return [block for block in content if block["type"] == "tool_result"]


def final_text(run: Run) -> str:
    """The answer's end, which must be a success."""
    (end,) = run.of_type("result")
    assert (end["subtype"], end["is_error"], run.returncode) == ("success", False, 0), (end, run.stderr)
    return end["result"]


def test_a_turn_with_a_call_and_its_result(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    run = agents.claude_code(QUESTION, "--allowedTools", "Bash")
    assert final_text(run) == "It is 42."
    assert [block["type"] for block in blocks(run)] == ["text", "tool_use", "text"]
    assert [result["content"] for result in results(run)] == ["nineteen-42"]


def test_the_second_request_finds_the_first_in_the_prefix_cache(server: AgentServer, agents: Agents):
    """Nothing in the prompt changes between two requests, so nothing is computed twice."""
    server.model.follow(use_shell)
    run = agents.claude_code(QUESTION, "--allowedTools", "Bash")
    first, second = server.model.prompts
    assert second.startswith(first + "I shall ask the shell.\n" + SHELL_CALL)
    assert "billing-header" not in first
    usage = run.of_type("result")[0]["usage"]
    assert usage["cache_read_input_tokens"] >= len(first) - 16


def test_a_key_does_as_well_as_a_bearer_token(server: AgentServer, agents: Agents):
    assert final_text(agents.claude_code("Hi", ANTHROPIC_API_KEY=KEY, ANTHROPIC_AUTH_TOKEN="")) == "Hello."


def test_a_wrong_key_is_named_as_such(server: AgentServer, agents: Agents):
    (end,) = agents.claude_code("Hi", ANTHROPIC_AUTH_TOKEN="sk-other").of_type("result")
    assert end["is_error"]
    assert end["api_error_status"] == 401, end
    assert not server.model.prompts


def test_thoughts_are_shown_and_come_back(server: AgentServer, agents: Agents):
    server.model.follow(lambda prompt: "<think>The shell adds.</think>" + use_shell(prompt))
    run = agents.claude_code(QUESTION, "--allowedTools", "Bash")
    assert final_text(run) == "It is 42."
    assert [block["thinking"] for block in blocks(run) if block["type"] == "thinking"] == ["The shell adds."] * 2
    assert "<think>The shell adds.</think>" in server.model.prompts[1]


def test_two_calls_at_once(server: AgentServer, agents: Agents):
    calls = [called("Bash", command=f"echo {word}-$((17 + 25))") for word in ("one", "two")]
    server.model.follow(lambda prompt: "Both." if "two-42" in prompt else "\n".join(calls))
    run = agents.claude_code(QUESTION, "--allowedTools", "Bash")
    assert final_text(run) == "Both."
    assert sorted(result["content"] for result in results(run)) == ["one-42", "two-42"]


@pytest.mark.parametrize(
    ("call", "told"),
    [(called("Gues", text="x"), "No such tool available"), (called("Bash", text="x"), "InputValidationError")],
)
def test_what_came_of_a_wrong_call_reaches_the_model(server: AgentServer, agents: Agents, call: str, told: str):
    server.model.follow(lambda prompt: "I see." if call in prompt else call)
    assert final_text(agents.claude_code(QUESTION, "--allowedTools", "Bash")) == "I see."
    assert told in server.model.prompts[1].partition(call)[2]


def test_an_image_that_a_tool_gives_is_no_error(server: AgentServer, agents: Agents):
    path = write_png(agents.work / "red.png")
    call = called("Read", file_path=str(path))
    server.model.follow(lambda prompt: "I cannot see it." if call in prompt else call)
    assert final_text(agents.claude_code("What is in red.png?", "--allowedTools", "Read")) == "I cannot see it."
    assert "image" in server.model.prompts[1].partition(call)[2]


def test_tools_that_only_their_maker_runs_are_left_out(server: AgentServer, agents: Agents):
    """Its web search asks the model once more, with a tool that the model's server should run itself."""
    call = called("WebSearch", query="seventeen")
    server.model.follow(lambda prompt: call if "my question" in prompt and call not in prompt else "Nothing.")
    run = agents.claude_code("my question", "--allowedTools", "WebSearch")
    assert final_text(run) == "Nothing."
    assert len(server.model.prompts) == 3


def test_structured_output(server: AgentServer, agents: Agents):
    server.model.follow(lambda prompt: "Done." if "<tool_response>" in prompt else called("StructuredOutput", sum=42))
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    run = agents.claude_code(QUESTION, "--json-schema", json.dumps(schema))
    final_text(run)
    assert run.of_type("result")[0]["structured_output"] == {"sum": 42}


def test_a_conversation_goes_on(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    agents.claude_code(QUESTION, "--allowedTools", "Bash")
    server.model.follow(lambda _: "Quite.")
    assert final_text(agents.claude_code("Are you sure?", "--continue")) == "Quite."
    (prompt,) = server.model.prompts
    assert prompt.index("nineteen-42") < prompt.index("It is 42.") < prompt.index("Are you sure?")


def test_a_conversation_is_summarised(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    agents.claude_code(QUESTION, "--allowedTools", "Bash")
    server.model.follow(lambda _: "<summary>They added 17 and 25.</summary>")
    agents.claude_code("/compact", "--continue")
    assert "nineteen-42" in server.model.prompts[0]
    server.model.follow(lambda _: "Quite.")
    assert final_text(agents.claude_code("Are you sure?", "--continue")) == "Quite."
    assert "They added 17 and 25." in server.model.prompts[0]
    assert "nineteen-42" not in server.model.prompts[0]


def test_an_overlong_prompt_is_understood(server: AgentServer, agents: Agents):
    (agents.work / "CLAUDE.md").write_text("x" * CONTEXT)
    (end,) = agents.claude_code("Hi").of_type("result")
    assert end["is_error"]
    assert end["result"].startswith("Prompt is too long")
