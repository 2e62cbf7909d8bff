"""`rayline serve` finds everything that can be known before Ray starts, and says it in one line."""

import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from live_server import free_port
from typer.testing import CliRunner

from deployments.cli import app, serve, settings
from deployments.config import AppConfig
from deployments.serve.resources import check_resources
from llm.errors import ConfigError, LLMError

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs" / "demo"


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not refused would start one."""
    monkeypatch.setattr(serve, "run_server", lambda *_, **__: pytest.fail("it was not refused"))
    monkeypatch.delenv("RAYLINE_KEYS", raising=False)


def refusal(*arguments: str) -> LLMError:
    # On a port that is free: whatever else runs on this machine, the reason is the one that is looked for.
    result = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *arguments])
    assert isinstance(result.exception, LLMError), result.output
    assert "\n" not in str(result.exception)
    return result.exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/directory"], "no such directory"),
        (["./nothing"], "no such directory"),
        ([__file__], "is a file"),
        (["--host", "0.0.0.0"], "no API keys are set"),
        (["--host", "0.0.0.0", "--api-keys-env", "RAYLINE_KEYS"], "RAYLINE_KEYS"),
        (["--host", "192.0.2.1", "--set", "allow_open_without_keys=true"], "not an address of this machine"),
        (["--set", "lora=/no/adapter"], "/no/adapter is not a directory"),
        (["--set", "engine.max_seq_length=5"], "max_seq_len"),
        (["--set", "engine.max_batch_size=0"], "max_batch_size"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: no such file; the bundled configurations are"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_refused(arguments: list[str], message: str):
    assert message in str(refusal(*arguments))


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in str(refusal("--port", str(port)))


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(404, "RepoNotFound", "the Hub has no model of that name"), (403, "GatedRepo", "is gated on the Hub")],
)
def test_hub_ids_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, code: str, message: str
):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("content-length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - the base class's name

        def log_message(self, *_: object) -> None:
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        result = serve_with_hub(f"http://127.0.0.1:{hub.server_port}", tmp_path)
    finally:
        hub.shutdown()
        hub.server_close()
    assert message in result.stderr


def test_a_hub_that_cannot_be_reached_is_told_soon(tmp_path: Path):
    with socket.socket() as silent:  # it takes the connection and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        result = serve_with_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert "cannot be downloaded from the Hub now" in result.stderr
    assert time.monotonic() - started < 60, "one time-out of 5 s, on however busy a machine"


def serve_with_hub(url: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """As users run it, as the Hub's address is read once a process."""
    environment = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-c",
        "from deployments.cli import main; main()",
        "serve",
        "some/model",
        "--port",
        str(free_port()),
    ]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("rayline: some/model ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replicas": {"num_replicas": 3}}, "need 3 GPUs and this machine has 2"),
        ({"replicas": {"num_gpus": 4}}, "need 4 GPUs"),
        ({"replicas": {"num_replicas": 2}, "engine": {"tensor_parallel_size": 2}}, "need 4 GPUs.* smaller --tp"),
        ({"replicas": {"num_replicas": 9, "num_cpus": 1}, "device": "cpu"}, "9.25 CPUs"),
        ({"replicas": {"autoscaling": {"min_replicas": 3, "max_replicas": 4}}}, "need 3 GPUs"),
    ],
)
def test_more_than_the_machine_has_is_refused(args: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_resources([AppConfig.model_validate(args)], {"CPU": 8.0, "GPU": 2.0})


def test_what_the_machine_has_is_enough():
    check_resources([AppConfig.model_validate({"replicas": {"num_replicas": 2}})], {"CPU": 8.0, "GPU": 2.0})
    check_resources([AppConfig()], {"CPU": 1.0})


def test_a_file_without_a_host_listens_on_this_machine_alone(tmp_path: Path):
    """Serve's own default is every interface."""
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    del content["http_options"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    read = settings.read_content(tmp_path / "config.yaml")
    serve._override(read, None, None, None, None, None, None, [])
    assert read["http_options"] == {"host": "127.0.0.1"}
    with pytest.raises(ConfigError, match="no API keys"):
        serve.read_config_file(tmp_path / "config.yaml")
