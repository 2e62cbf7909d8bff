"""The agents' own programs, pointed at a server: set up as docs/agents.md says."""

import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent_server import KEY

PROGRAMS = Path(__file__).parent / "node_modules" / ".bin"
PAGE = Path(__file__).parents[2] / "docs" / "agents.md"
"""What users are told to set."""
TIMEOUT_S = 120


def install_hint() -> str | None:
    """What to do before the agents can be run; None where they are there."""
    if all((PROGRAMS / name).exists() for name in ("claude", "codex")):
        return None
    if shutil.which("npm") is None:
        return "the agents are not installed: install Node.js 18 or newer with npm, then run `make agents`"
    return "the agents are not installed: run `make agents`"


@dataclass
class Run:
    """What a program wrote: its events, one JSON object a line."""

    returncode: int
    events: list[dict]
    stderr: str

    def of_type(self, *kinds: str) -> list[dict]:
        return [event for event in self.events if event["type"] in kinds]


class Agents:
    """Runs the agents against the server at `url`; what they leave behind is in `directory`."""

    def __init__(self, url: str, directory: Path) -> None:
        self._home = directory / "home"
        self.work = directory / "work"
        for path in (self._home, self.work):
            path.mkdir()
        page = PAGE.read_text().replace("http://localhost:8000", url).replace("my-model", "demo")
        self._exports = dict(re.findall(r"([A-Z_]+)=(\S+)", page[page.index("$ export ANTHROPIC_") :].split("```")[0]))
        (self._home / "config.toml").write_text(page.partition("```toml\n")[2].split("```")[0])

    def claude_code(self, prompt: str, *options: str, **environment: str) -> Run:
        """One prompt to Claude Code; `environment` goes over what the documentation says to export."""
        variables = {**self._exports, "ANTHROPIC_AUTH_TOKEN": KEY, "CLAUDE_CODE_MAX_RETRIES": "0", **environment}
        command = ["claude", "--print", "--output-format", "stream-json", "--verbose", *options, "--", prompt]
        return self._run(command, {name: value for name, value in variables.items() if value})

    def codex(self, prompt: str, *, command: tuple[str, ...] = (), key: str = KEY, **settings: object) -> Run:
        """One prompt to Codex; `settings` go over what the documentation says to configure.

        `command` says what else to do than begin a conversation.
        """
        changes = {"model_providers.rayline.request_max_retries": 0, "model_providers.rayline.stream_max_retries": 0}
        overrides = [f"--config={name}={json.dumps(value)}" for name, value in {**changes, **settings}.items()]
        options = ["--json", "--skip-git-repo-check", "--sandbox", "danger-full-access", *overrides]
        variables = {"CODEX_HOME": str(self._home), "RAYLINE_API_KEY": key}
        return self._run(["codex", "exec", *options, *command, "--", prompt], variables)

    def _run(self, command: list[str], variables: dict[str, str]) -> Run:
        process = subprocess.Popen(
            [str(PROGRAMS / command[0]), *command[1:]],
            env={"HOME": str(self._home), "PATH": os.environ["PATH"], **variables},
            cwd=self.work, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.communicate()
            raise
        events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        return Run(process.returncode, events, errors)
