"""Reads and checks a Serve configuration file with Rayline applications before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.adapters.directory import read_adapter
from deployments.adapters.models import adapter_rules
from deployments.config import AppConfig, resolve_paths
from deployments.model_config import EngineKind, ServedModelConfig
from deployments.replica.model_memory import share_of
from deployments.router.keys import find_keys
from deployments.serve.front_end import FrontEnd, check_open
from deployments.unique_yaml import load_yaml
from llm.checkpoint.generation_defaults import load_vocab_size
from llm.checkpoint.hub import find_local_checkpoint
from llm.config import ModelConfig, describe
from llm.errors import ConfigError, LLMError

BUILDER = "deployments.app:build_app"
_PACKAGE = Path(__file__).parents[1]
_DEFAULT = "serve_config.yaml"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A Serve configuration file, read and validated.

    Attributes:
        front_end: where Serve will listen.
        apps: arguments of every Rayline application, by its name.
    """

    front_end: FrontEnd
    apps: dict[str, AppConfig]


def find_config_file(given: Path | None) -> Path:
    """Find the configuration file: a path, the name of one in the package, or by default the one in this directory.

    Raises:
        ConfigError: there is none.
    """
    if given is None:
        return Path(_DEFAULT) if Path(_DEFAULT).is_file() else _PACKAGE / _DEFAULT
    if given.is_file():
        return given
    ours = {file.stem: file for file in sorted((_PACKAGE / "configs").glob("*.yaml"))}
    if str(given) not in ours:
        raise ConfigError(f"{given}: no such file; the bundled configurations are {', '.join(ours)}")
    return ours[str(given)]


def read_config_file(path: Path) -> ServerConfig:
    """Read a Serve configuration file and check all that can be known without its models.

    Raises:
        ConfigError: what is wrong and how to mend it, in one line.
    """
    return read_config(read_yaml(path), path)


def read_config(content: dict[str, Any], path: Path) -> ServerConfig:
    """Check the content of a Serve configuration file as `read_config_file` does.

    Args:
        path: the file, for messages.

    Raises:
        ConfigError: what is wrong and how to mend it, in one line.
    """
    front_end = FrontEnd.of_options(content.get("http_options") or {})
    apps: dict[str, AppConfig] = {}
    for application in _own_applications(path, content):
        name = str(application.get("name") or "default")
        try:
            config = AppConfig.model_validate(application.get("args") or {})
        except ValidationError as error:
            raise ConfigError(f"{path}: args of application {name!r}: {describe(error)}") from error
        check_open(config, bool(find_keys(config).keys), front_end)
        apps[name] = config
    return ServerConfig(front_end, apps)


def check_config_file(path: Path) -> ServerConfig:
    """Check a Serve configuration file and the checkpoints of its Rayline applications.

    Raises:
        CheckpointError, ConfigError: what is wrong and how to mend it, in one line.
    """
    server = read_config_file(path)
    for config in server.apps.values():
        for entry in resolve_paths(config).entries:
            check_model(entry)
    return server


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The findings in a model's directory.

    Attributes:
        model: its shape; None if its weights are not loaded or are not on this machine.
        warnings: what the server's operator should know, one line each.
    """

    model: ModelConfig | None = None
    warnings: tuple[str, ...] = ()


def check_model(config: ServedModelConfig) -> ModelReport:
    """Find mistakes now that would otherwise stop every replica later or fail every request.

    Raises:
        CheckpointError, ConfigError: the checkpoint or its adapter is here, and cannot be served as configured.
    """
    if config.lora is not None and not Path(config.lora).is_dir():
        raise ConfigError(f"lora: {config.lora} is not a directory; give the one that holds adapter_config.json")
    _check_adapters(config)
    directory = find_local_checkpoint(config.model)
    if directory is None:
        return ModelReport()
    from deployments.chat.model_text import ModelText  # imports grammars, which `rayline --help` does not need

    report = _check_weights(config, directory) if config.engine_kind is EngineKind.TORCH else ModelReport()
    vocab_size = load_vocab_size(directory) if report.model is None else report.model.vocab_size
    text = ModelText.load(config)
    text.check(config, vocab_size)
    return ModelReport(report.model, (*report.warnings, *text.warnings))


def _check_adapters(config: ServedModelConfig) -> None:
    """Check the adapters that the configuration names, as far as they are here, and the places that it names."""
    for entry in config.adapters:
        directory = Path(entry.path).expanduser()
        if directory.is_dir():
            try:
                read_adapter(directory, adapter_rules(config))
            except LLMError as error:
                raise type(error)(f"adapters, {entry.name!r}: {error}") from error
        elif directory.is_absolute():
            raise ConfigError(f"adapters, {entry.name!r}: {directory} is not a directory")
    if config.adapter_folder is not None and not Path(config.adapter_folder).expanduser().is_dir():
        raise ConfigError(f"adapter_folder: {config.adapter_folder} is not a directory; make it, even if it is empty")


def _check_weights(config: ServedModelConfig, directory: Path) -> ModelReport:
    """What the engines will load."""
    from llm.attention.backends import check_known  # these import PyTorch, which the rest does not need
    from llm.checkpoint.adapter import check_lora
    from llm.checkpoint.loading import check_checkpoint
    from llm.serving.checks import check_features, check_quantization, longest_context

    checked = check_checkpoint(directory)
    check_known(config.engine.attention_backend)
    longest_context(checked.config, config.engine)
    check_quantization(checked.config, config.engine)
    notes = check_features(checked.config, config.engine)
    if config.engine.tensor_parallel_size > 1:
        share_of(config, checked.config, config.engine.tensor_parallel_size)  # refuses a model that cannot be split
    if config.lora is not None:
        check_lora(checked.config, config.lora)
    return ModelReport(checked.config, (*checked.warnings, *notes))


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file; nothing if it is not an object.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def list_applications(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The applications of a file's content, one at least.

    Raises:
        ConfigError: it has no list of them.
    """
    applications = content.get("applications")
    if (
        not isinstance(applications, list)
        or not applications
        or not all(isinstance(item, dict) for item in applications)
    ):
        raise ConfigError(f"{path} has no list of applications; see serve_config.yaml for one that works")
    return applications


def _own_applications(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    ours = [item for item in list_applications(path, content) if item.get("import_path") == BUILDER]
    if not ours:
        raise ConfigError(f"{path} has no application with import_path: {BUILDER}")
    return ours
