"""`rayline serve` from nothing to an answer, and the commands that talk to it."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from live_server import ROOT, free_port

RAYLINE = Path(sys.executable).parent / "rayline"

pytestmark = pytest.mark.timeout(180)


def rayline(*arguments: str, **options) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([RAYLINE, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_serve_chat_status(tmp_path: Path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HOME": str(tmp_path)}
    process = subprocess.Popen(
        [RAYLINE, "serve", str(ROOT / "configs" / "demo"), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    try:
        seen = []
        while not seen or "Rayline is ready" not in seen[-1]:
            seen.append(lines.get(timeout=90))
        answer = rayline("chat", "What is 17 + 25?", "--url", url, "--temperature", "0")
        assert (answer.stdout, answer.returncode) == ("42\n", 0)
        answer = rayline("chat", "-", "--url", url, input="Spell 'river' backwards.")
        assert answer.stdout == "revir\n"
        talk = '/set temperature 0\nWhat is 2 + 2?\n/nonsense\n"""\nWhat is\n3 + 3?\n"""\n/exit\n'
        answer = rayline("chat", "--url", url, input=talk, env=environment)
        assert answer.returncode == 0
        assert "4" in answer.stdout
        assert "tokens/s" in answer.stdout
        assert "/new" in answer.stdout, "help for an unknown command"
        status = json.loads(rayline("status", "--url", url, "--json").stdout)
        assert [replica["state"] for replica in status["replicas"].values()] == ["serving"]
        table = rayline("status", "--url", url, "--once")
        assert "serving" in table.stdout
        assert table.returncode == 0
    finally:
        process.terminate()
        process.wait(timeout=25)  # with Serve's own draining period it takes more than 30
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
