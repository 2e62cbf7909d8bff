"""`rayline serve` from nothing to an answer and to its end, and the commands that talk to it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from image_tree import clean_environment, copy_tree, install

from chaos.command_faults import Command
from chaos.streams import Clients

RAYLINE = Path(sys.executable).parent / "rayline"

ONE_THREAD = ("--set", "replicas.torch_threads=1")
"""Each server would take all cores, and its threads spin while they wait for each other."""

pytestmark = pytest.mark.timeout(300)


def rayline(*arguments: str, **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([RAYLINE, *arguments], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Command, Command]]:
    """Two side by side, started together: this repository's, and the one that the image installs, which is a wheel's,
    with another model and from an empty directory."""
    place = tmp_path_factory.mktemp("image")
    copy_tree(place / "app")
    (place / "app" / "configs" / "demo").rename(place / "app" / "configs" / "other")
    binaries = install(place / "app", place / "environment")
    (place / "empty").mkdir()
    other = str(place / "app" / "configs" / "other")
    image = Command([other, *ONE_THREAD], (binaries / "rayline",), place / "empty", clean_environment())
    with Command(ONE_THREAD) as ours, image, ThreadPoolExecutor() as pool:
        for waiting in [pool.submit(server.wait_until_ready) for server in (ours, image)]:
            waiting.result()
        yield ours, image


def test_two_servers_run_side_by_side(servers: tuple[Command, Command]):
    """Each answers with its own model alone, HAProxy and routers included; a third on one's port is refused."""
    for server, name in zip(servers, ("demo", "other"), strict=True):
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for _ in range(10):
                assert http.get("/v1/models").json()["data"][0]["id"] == name
            question = {"model": name, "messages": [{"role": "user", "content": "What is 17 + 25?"}]}
            answer = http.post("/v1/chat/completions", json=question).json()
            assert answer["choices"][0]["message"]["content"] == "42"
    refused = rayline("serve", "--port", str(servers[0].port))
    assert refused.returncode == 1
    assert refused.stderr == (
        f"rayline: port {servers[0].port} of 127.0.0.1 is in use by another program: end it, or choose another --port\n"
    )


def test_the_banner_is_all_that_is_printed(servers: tuple[Command, Command]):
    ours, _ = servers
    first, *lines = ours.output.splitlines()
    assert first == f"Rayline is ready: {ours.url}"
    assert [line.split()[0] for line in lines[:-1]] == [
        "chat", "fleet", "API", "model", "device", "context", "slots", "memory", "dashboard", "HAProxy"
    ]  # fmt: skip
    assert lines[-1].startswith(f"  curl {ours.url}/v1/chat/completions ")
    assert "pid=" not in ours.errors, "a line of Ray's"


def test_serve_chat_status(servers: tuple[Command, Command], tmp_path: Path):
    url = servers[0].url
    answer = rayline("chat", "What is 17 + 25?", "--url", url, "--temperature", "0")
    assert (answer.stdout, answer.returncode) == ("42\n", 0)
    answer = rayline("chat", "-", "--url", url, input="Spell 'river' backwards.")
    assert answer.stdout == "revir\n"
    talk = '/set temperature 0\nWhat is 2 + 2?\n/nonsense\n"""\nWhat is\n3 + 3?\n"""\n/exit\n'
    answer = rayline("chat", "--url", url, input=talk, env={**os.environ, "HOME": str(tmp_path)})
    assert answer.returncode == 0
    assert "4" in answer.stdout
    assert "tokens/s" in answer.stdout
    assert "/new" in answer.stdout, "help for an unknown command"
    status = json.loads(rayline("status", "--url", url, "--json").stdout)
    assert [replica["state"] for replica in status["replicas"].values()] == ["serving"]
    table = rayline("status", "--url", url, "--once")
    assert "serving" in table.stdout
    assert table.returncode == 0


async def test_stopping_ends_streams_behind_haproxy_and_leaves_the_other_server_alone(
    servers: tuple[Command, Command],
):
    """F23 with Ctrl-C, and SIGTERM of a server that is idle."""
    import asyncio

    ours, other = servers
    async with Clients(ours.url) as clients:
        asking = [asyncio.create_task(clients.ask(f"Once {i}", 1900)) for i in range(4)]
        while (await clients.get("/rayline/stats"))["router"]["num_live"] < 4:
            await asyncio.sleep(0.02)
        seconds, left = await asyncio.to_thread(ours.stop)
        stories = await asyncio.gather(*asking)
    assert {story.error or "whole" for story in stories} <= {"shutting_down", "whole"}, "none is cut"
    assert any(story.error for story in stories)
    assert (seconds < 5.5, left, ours.process.returncode) == (True, [], 0)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{ours.url}/health")
    assert httpx.get(f"{other.url}/health", timeout=30).status_code == 200
    seconds, left = await asyncio.to_thread(other.stop, signal.SIGTERM)
    assert (seconds < 5.5, left, other.process.returncode) == (True, [], 0)


def test_a_replica_that_cannot_start_ends_the_command_with_its_cause(tmp_path: Path):
    """What only the replica finds out, as it loads the weights: here, an adapter that is none."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with Command(["--no-haproxy", "--set", f"lora={tmp_path}"]) as command:
        assert command.process.wait(240) == 1
        *_, last = command.errors.splitlines()
        assert last.startswith(f"rayline: {tmp_path}")
        assert "pid=" not in command.errors
        assert "Traceback" not in command.errors
        assert command.output == ""
