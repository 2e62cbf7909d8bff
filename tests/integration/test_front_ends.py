"""`serve run` with a config file, with HAProxy and the throughput flag and without, and what stops a start."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from live_server import ROOT, Server, free_port, replica_pids, wait_until_ready

SERVE = Path(sys.executable).with_name("serve")
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # with 1 an HAProxy may stay behind, and keep its ports
}
KEY = "sk-integration"


class ServeRun:
    """A `serve run` process on a cluster of its own, and what it prints."""

    def __init__(self, directory: Path, args: dict, host: str = "127.0.0.1", **environment: str) -> None:
        port = free_port()
        self.app_name = f"rayline-front-{port}"
        self.url = f"http://127.0.0.1:{port}"
        config = {
            "http_options": {"host": host, "port": port},
            "applications": [
                {"name": self.app_name, "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
            ],
        }
        (directory / "serve.yaml").write_text(yaml.safe_dump(config))
        self._log = directory / "serve.log"
        self._process = subprocess.Popen(
            [SERVE, "run", str(directory / "serve.yaml")],
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text(errors="replace"))

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServeRun, Server]]:
    args = {"model": "configs/demo", "device": "cpu", "api_keys_env": "RAYLINE_KEYS", "replicas": {"torch_threads": 1}}
    run = ServeRun(tmp_path_factory.mktemp("haproxy"), args, **HAPROXY, RAYLINE_KEYS=KEY)
    server = Server(run.url, num_replicas=1)
    server.http.headers["authorization"] = f"Bearer {KEY}"
    server.openai = openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0, timeout=60)
    try:
        wait_until_ready(server, num_replicas=1)
        yield run, server
    finally:
        run.stop()


def test_it_answers_behind_haproxy(haproxy: tuple[ServeRun, Server]):
    _, server = haproxy
    server.check_healthy()
    stream = server.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is 17 + 25?"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "42"


def test_errors_are_openais_behind_haproxy(haproxy: tuple[ServeRun, Server]):
    _, server = haproxy
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "unknown_route"
    json_type = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=bytes(9 << 20), headers=json_type)
    assert response.status_code == 413
    server.check_healthy()


def test_leaving_frees_the_pages_behind_haproxy(haproxy: tuple[ServeRun, Server]):
    _, server = haproxy
    stream = server.openai.completions.create(
        model="demo", prompt="a", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.wait_for(lambda: server.num_used_pages() > 0)
    generated_before = server.num_generated_tokens()
    stream.close()
    server.wait_for(lambda: server.num_used_pages() == 0)
    assert server.num_generated_tokens() - generated_before < 1900, "it was generated to its end"


def test_a_stream_survives_its_only_replica_behind_haproxy(haproxy: tuple[ServeRun, Server]):
    """Ray Serve starts another replica; the stream goes on in it, after a pause."""
    run, server = haproxy
    request = {"model": "demo", "prompt": "Once", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    expected = server.openai.completions.create(**request).choices[0].text
    stream = server.openai.completions.create(**request, stream=True)
    pieces = []
    for chunk in stream:
        pieces.append(chunk.choices[0].text)
        if len(pieces) == 20:
            os.kill(replica_pids(run.app_name)[0], signal.SIGKILL)
    assert "".join(pieces) == expected
    assert server.stats()["router"]["num_resumes"] == 1
    server.check_healthy()


def test_keys_are_asked_for(haproxy: tuple[ServeRun, Server]):
    run, _ = haproxy
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{run.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    assert httpx.get(f"{run.url}/health").status_code == 200
    assert httpx.get(f"{run.url}/docs").status_code == 401
    assert KEY not in run.output


def test_the_banner_tells_what_to_paste(haproxy: tuple[ServeRun, Server]):
    run, server = haproxy
    server.wait_for(lambda: "Rayline is ready" in run.output, 10, "no banner")
    server.wait_for(lambda: f"curl {run.url}/v1/chat/completions" in run.output, 10, "it is cut off")
    banner = run.output[run.output.index("Rayline is ready") :]
    assert banner.startswith(f"Rayline is ready: {run.url}\n")
    assert re.search(r"context +2,048 tokens", banner)


def test_an_open_port_without_keys_is_refused(tmp_path: Path, haproxy: tuple[ServeRun, Server]):
    _, server = haproxy
    run = ServeRun(tmp_path, {"model": "configs/demo"}, host="0.0.0.0")
    try:
        server.wait_for(lambda: "allow_open_without_keys" in run.output, 60, "it did not say why it does not start")
        assert httpx.get(run.url, trust_env=False).status_code in (404, 500, 503)
    finally:
        run.stop()
