"""Claude Code, the real one, against the server."""

from command_lines import Agents
from scripted_model import AgentServer, called


def use_shell(prompt: str) -> str:
    """Calls the shell for a sum, then says what came out."""
    if "nineteen-42" in prompt:
        return "It is 42."
    return "I shall ask the shell.\n" + called("Bash", command="echo nineteen-$((17 + 25))", description="Adds")


def test_a_turn_with_a_call_and_its_result(server: AgentServer, agents: Agents):
    server.model.follow(use_shell)
    run = agents.claude_code("What is 17 + 25?", "--allowedTools", "Bash")
    assert run.returncode == 0, (run.stderr, run.events[-1:])
    blocks = [block for event in run.of_type("assistant") for block in event["message"]["content"]]
    assert [block["type"] for block in blocks] == ["text", "tool_use", "text"]
    (result,) = run.of_type("user")
    assert result["message"]["content"][0]["content"] == "nineteen-42"
    (end,) = run.of_type("result")
    assert (end["subtype"], end["is_error"], end["result"]) == ("success", False, "It is 42.")
