"""One server for all agents; each test brings the script of the model behind it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_server import AgentServer
from command_lines import Agents, install_hint
from scripted_model import scripted_model


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentServer]:
    with (
        pytest.MonkeyPatch.context() as patch,
        AgentServer(*scripted_model(tmp_path_factory.mktemp("model"), patch)) as server,
    ):
        yield server


@pytest.fixture
def server(shared_server: AgentServer) -> AgentServer:
    """The server with a model that says hello, until the test gives it a script."""
    shared_server.model.follow(lambda _: "Hello.")
    return shared_server


@pytest.fixture
def agents(server: AgentServer, tmp_path: Path) -> Agents:
    """The agents' command lines, each with a home of its own and no way but to the server."""
    missing = install_hint()
    if missing and not os.environ.get("CI"):
        pytest.skip(missing)
    assert not missing, missing
    return Agents(server.url, tmp_path)
