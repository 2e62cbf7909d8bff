"""`make serve`, with HAProxy and the throughput flag, and what stops a start."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from live_server import HTTP2_OFFER, ROOT, Server, free_port, replica_pids, wait_until_ready

from deployments.serve.front_end import FrontEnd
from deployments.serve.haproxy import haproxy_environment
from deployments.serve.ports import claimed_ports

HAPROXY = {
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # with 1 an HAProxy may stay behind, and keep its ports
}
KEY = "sk-integration"


class MakeServe:
    """`make serve` on a cluster of its own with our configuration file, changed as told, and what it prints."""

    def __init__(
        self, directory: Path, args: dict, port: int | None = None, host: str = "127.0.0.1", **environment: str
    ) -> None:
        port = port or free_port()
        self.app_name = f"rayline-front-{port}"
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"] = {"host": host, "port": port}
        (application,) = config["applications"]
        application["name"] = self.app_name
        application["args"] |= args
        (directory / "serve.yaml").write_text(yaml.safe_dump(config))
        self._log = directory / "serve.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                # Where the tests run in a shell's background, it would inherit that Ctrl-C is ignored.
                ["env", "--default-signal=INT", "make", "serve", f"CONFIG={directory / 'serve.yaml'}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._log.read_text(errors="replace"))

    def stop(self) -> None:
        """As Ctrl-C does, which reaches `make` and what it runs."""
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MakeServe, Server]]:
    args = {"device": "cpu", "api_keys_env": "RAYLINE_KEYS", "replicas": {"torch_threads": 1}}
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="rayline-") as directory,  # a short path, for HAProxy's sockets
        claimed_ports(FrontEnd("127.0.0.1", port), haproxy=True) as ports,
    ):
        environment = {**haproxy_environment(Path(directory)), **ports, **HAPROXY, "RAYLINE_KEYS": KEY}
        run = MakeServe(tmp_path_factory.mktemp("haproxy"), args, port, **environment)
        server = Server(run.url, num_replicas=1)
        server.http.headers["authorization"] = f"Bearer {KEY}"
        server.openai = openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        try:
            wait_until_ready(server, num_replicas=1)
            yield run, server
        finally:
            run.stop()


def test_it_answers_behind_haproxy(haproxy: tuple[MakeServe, Server]):
    _, server = haproxy
    server.check_healthy()
    stream = server.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is 17 + 25?"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "42"


def test_errors_are_openais_behind_haproxy(haproxy: tuple[MakeServe, Server]):
    _, server = haproxy
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "unknown_route"
    json_type = {"content-type": "application/json"}
    response = server.http.post("/v1/completions", content=bytes(9 << 20), headers=json_type)
    assert response.status_code == 413
    server.check_healthy()


def test_javas_offer_of_http2_and_careless_paths_behind_haproxy(haproxy: tuple[MakeServe, Server]):
    run, server = haproxy
    completion = {"model": "demo", "prompt": "a", "max_tokens": 2}
    for path in ("/v1/completions", "//v1//completions/"):
        answer = server.http.post(f"{run.url}{path}", json=completion, headers=HTTP2_OFFER)
        assert answer.status_code == 200, answer.text
    assert httpx.head(f"{run.url}/health").status_code == 200


def test_leaving_frees_the_pages_behind_haproxy(haproxy: tuple[MakeServe, Server]):
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


def test_a_stream_survives_its_only_replica_behind_haproxy(haproxy: tuple[MakeServe, Server]):
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


def test_keys_are_asked_for(haproxy: tuple[MakeServe, Server]):
    run, _ = haproxy
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{run.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    assert httpx.get(f"{run.url}/health").status_code == 200
    assert httpx.get(f"{run.url}/docs").status_code == 200
    assert httpx.get(f"{run.url}/metrics").status_code == 401
    assert KEY not in run.output


def test_the_banner_tells_what_to_paste(haproxy: tuple[MakeServe, Server]):
    run, server = haproxy
    server.wait_for(lambda: "Rayline is ready" in run.output, 10, "no banner")
    server.wait_for(lambda: f"curl {run.url}/v1/chat/completions" in run.output, 10, "it is cut off")
    banner = run.output[run.output.index("Rayline is ready") :]
    assert banner.startswith(f"Rayline is ready: {run.url}\n")
    assert re.search(r"context +2,048 tokens", banner)


def test_an_open_port_without_keys_is_refused_before_ray_starts(tmp_path: Path):
    run = MakeServe(tmp_path, {}, host="0.0.0.0")
    assert run.process.wait(60) != 0
    assert "allow_open_without_keys" in run.output
    assert "Started a local Ray instance" not in run.output
