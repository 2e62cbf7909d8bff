"""What tests know of a server that runs: how to ask it, and how to see that it is well."""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).parents[1]
HTTP2_OFFER = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
"""Headers of the first request on each connection of Java's HTTP client."""
APP_NAME = f"rayline-test-{os.getpid()}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """An application that answers over HTTP."""

    url: str
    num_replicas: int = 2

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)

    @cached_property
    def openai(self) -> "openai.OpenAI":
        """A client of OpenAI's; made when asked for, so that tests of the engine alone do not need the package."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def stats(self) -> dict:
        return self.http.get("/rayline/stats").json()

    def fleet(self, key: str = "unused") -> dict:
        """What the fleet page is sent first."""
        with self.http.stream("GET", "/rayline/events", headers={"authorization": f"Bearer {key}"}) as answer:
            line = next(line for line in answer.iter_lines() if line.startswith("data: "))
        return json.loads(line.removeprefix("data: "))

    def num_used_pages(self) -> int:
        return sum(replica["num_used_pages"] for replica in self.stats()["replicas"].values())

    def num_generated_tokens(self) -> int:
        return sum(replica["num_generated_tokens"] for replica in self.stats()["replicas"].values())

    def wait_while_generating(self, pause_s: float = 20) -> None:
        """Wait until no page is in use, for as long as there are new tokens: how long that takes the machine says."""
        generated, changed_at = -1, time.monotonic()
        while self.num_used_pages() > 0:
            if (now_generated := self.num_generated_tokens()) != generated:
                generated, changed_at = now_generated, time.monotonic()
            assert time.monotonic() - changed_at < pause_s, "pages are in use, and nothing is generated"
            time.sleep(0.1)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 60, what: str = "") -> float:
        """Seconds that it took. Most conditions ask the server, which has better things to do where that takes long."""
        started, pause_s = time.monotonic(), 0.02
        while not condition():
            assert time.monotonic() - started < timeout_s, what or "timed out"
            time.sleep(pause_s)
            pause_s = min(1.3 * pause_s, 0.2)
        return time.monotonic() - started

    def ask(self, question: str = "What is 17 + 25?", max_tokens: int = 30) -> str:
        """A question with a known answer, answered in full."""
        answer = self.openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], max_tokens=max_tokens, temperature=0
        )
        return answer.choices[0].message.content or ""

    def check_healthy(self) -> None:
        """It answers, nothing runs on, and every page is back."""
        for _ in range(self.num_replicas):
            assert self.ask() == "42"
        self.wait_for(lambda: self.num_used_pages() == 0, what="pages are still in use")
        self.wait_for(lambda: self.stats()["router"]["num_live"] == 0, what="requests are still live")


def wait_until_ready(server: Server, num_replicas: int) -> None:
    """Until the router knows the engines and every replica has answered once."""

    def is_ready() -> bool:
        try:
            return server.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    server.wait_for(is_ready, 240, "the application did not become ready")

    def have_all_answered() -> bool:
        server.ask()
        return len(server.stats()["replicas"]) >= num_replicas

    server.wait_for(have_all_answered, 120, "not every replica answers")


def replica_pids(app_name: str = APP_NAME, deployment: str = "EngineReplica") -> list[int]:
    """Processes of one application's deployment, and of no other application on the machine."""
    from chaos.fleet import pids_of

    return pids_of(f"ray::ServeReplica:{app_name}:{deployment}")
