"""Codex, the real one, against the server."""

from command_lines import Agents
from scripted_model import AgentServer, called


def use_shell(prompt: str) -> str:
    """Calls the shell for a sum, then says what came out."""
    if "nineteen-42" in prompt:
        return "It is 42."
    return "I shall ask the shell.\n" + called("exec_command", cmd="echo nineteen-$((17 + 25))")


def test_a_turn_with_a_call_and_its_result(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    run = agents.codex("What is 17 + 25?", "--ephemeral")
    assert run.returncode == 0, (run.stderr, run.events[-1:])
    items = [event["item"] for event in run.of_type("item.completed")]
    assert [item["type"] for item in items[-3:]] == ["agent_message", "command_execution", "agent_message"]
    assert (items[-2]["aggregated_output"], items[-2]["exit_code"]) == ("nineteen-42\n", 0)
    assert items[-1]["text"] == "It is 42."
    (end,) = run.of_type("turn.completed")
    assert end["usage"]["cached_input_tokens"] > 0.4 * end["usage"]["input_tokens"]
