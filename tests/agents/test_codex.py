"""Codex, the real one, against the server."""

import pytest
from agent_server import AgentServer
from command_lines import Agents, Run
from png import write_png
from scripted_model import CONTEXT, called, told_name

QUESTION = "What is 17 + 25?"
SHELL_CALL = called("exec_command", cmd="echo nineteen-$((17 + 25))")


def use_shell(prompt: str) -> str:
    """Calls the shell for a sum, then says what came out."""
    return "It is 42." if "nineteen-42" in prompt else "I shall ask the shell.\n" + SHELL_CALL


def items(run: Run, *kinds: str) -> list[dict]:
    """What the model said and what its tools did, of a turn that must be a success."""
    assert (run.returncode, len(run.of_type("turn.completed"))) == (0, 1), (run.events[-1:], run.stderr)
    return [event["item"] for event in run.of_type("item.completed") if event["item"]["type"] in kinds]


def texts(run: Run) -> list[str]:
    return [item["text"] for item in items(run, "agent_message")]


def test_a_turn_with_a_call_and_its_result(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    run = agents.codex(QUESTION)
    assert texts(run) == ["I shall ask the shell.\n", "It is 42."]
    (command,) = items(run, "command_execution")
    assert (command["aggregated_output"], command["exit_code"]) == ("nineteen-42\n", 0)


def test_the_second_request_finds_the_first_in_the_prefix_cache(server: AgentServer, agents: Agents):
    """Nothing in the prompt changes between two requests, so nothing is computed twice."""
    server.model.follow(use_shell)
    run = agents.codex(QUESTION)
    first, second = server.model.prompts
    assert second.startswith(first + "I shall ask the shell.\n" + SHELL_CALL)
    assert run.of_type("turn.completed")[0]["usage"]["cached_input_tokens"] >= len(first) - 16


def test_a_wrong_key_is_named_as_such(server: AgentServer, agents: Agents):
    run = agents.codex("Hi", key="sk-other")
    assert run.returncode != 0
    assert "401" in run.of_type("turn.failed")[0]["error"]["message"]
    assert not server.model.prompts


def test_thoughts_are_counted_and_come_back(server: AgentServer, agents: Agents):
    server.model.follow(lambda prompt: "<think>The shell adds.</think>" + use_shell(prompt))
    run = agents.codex(QUESTION)
    assert texts(run)[-1] == "It is 42."
    assert run.of_type("turn.completed")[0]["usage"]["reasoning_output_tokens"] > 0
    assert "<think>The shell adds.</think>" in server.model.prompts[1]


def test_two_calls_at_once(server: AgentServer, agents: Agents):
    calls = [called("exec_command", cmd=f"echo {word}-$((17 + 25))") for word in ("one", "two")]
    server.model.follow(lambda prompt: "Both." if "two-42" in prompt else "\n".join(calls))
    run = agents.codex(QUESTION)
    assert texts(run) == ["Both."]
    outputs = [item["aggregated_output"] for item in items(run, "command_execution")]
    assert sorted(outputs) == ["one-42\n", "two-42\n"]  # whichever ended first


def test_a_function_of_a_namespace_is_found_again(server: AgentServer, agents: Agents):
    """Codex runs such a call only if its namespace comes with it."""

    def delegate(prompt: str) -> str:
        if "<tool_response>" in prompt:
            return "It is under way."
        return called(told_name(prompt, "spawn_agent"), message="Say hello.") if QUESTION in prompt else "Hello."

    server.model.follow(delegate)
    run = agents.codex(QUESTION)
    assert "It is under way." in texts(run)
    (call,) = items(run, "collab_tool_call")
    assert (call["tool"], call["status"], len(call["receiver_thread_ids"])) == ("spawn_agent", "completed", 1)


@pytest.mark.parametrize(
    ("call", "told"),
    [(called("gues", text="x"), "unsupported call"), (called("exec_command", text="x"), "missing field `cmd`")],
)
def test_what_came_of_a_wrong_call_reaches_the_model(server: AgentServer, agents: Agents, call: str, told: str):
    server.model.follow(lambda prompt: "I see." if call in prompt else call)
    assert texts(agents.codex(QUESTION)) == ["I see."]
    assert told in server.model.prompts[1].partition(call)[2]


def test_an_image_that_a_tool_gives_is_no_error(server: AgentServer, agents: Agents):
    write_png(agents.work / "red.png")
    call = called("view_image", path="red.png")
    server.model.follow(lambda prompt: "I cannot see it." if call in prompt else call)
    assert texts(agents.codex("What is in red.png?")) == ["I cannot see it."]
    assert "image" in server.model.prompts[1].partition(call)[2]


def test_a_conversation_goes_on(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    texts(agents.codex(QUESTION))
    server.model.follow(lambda _: "Quite.")
    assert texts(agents.codex("Are you sure?", command=("resume", "--last"))) == ["Quite."]
    (prompt,) = server.model.prompts
    assert prompt.index("nineteen-42") < prompt.index("It is 42.") < prompt.index("Are you sure?")


def test_a_conversation_is_summarised(server: AgentServer, agents: Agents):
    """Past a limit Codex has the model summarise the conversation, and goes on with the summary."""

    def summarise(prompt: str) -> str:
        if "They added 17 and 25." in prompt:
            return "Quite."
        return "They added 17 and 25." if "COMPACTION" in prompt else use_shell(prompt)

    server.model.follow(summarise)
    run = agents.codex(QUESTION, model_auto_compact_token_limit=1)
    assert texts(run)[-1] == "Quite."
    _, summary, last = server.model.prompts
    assert "nineteen-42" in summary
    assert "nineteen-42" not in last


def test_an_overlong_prompt_is_understood(server: AgentServer, agents: Agents):
    (agents.work / "AGENTS.md").write_text("x" * CONTEXT)
    run = agents.codex("Hi", project_doc_max_bytes=CONTEXT)
    assert "context window" in run.of_type("turn.failed")[0]["error"]["message"]
