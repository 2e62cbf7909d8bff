"""What is wrong with a configuration file, in one line, before anything starts.

    python -m deployments.check serve_config.yaml

Exits with 1 where `serve run` could not serve it: a key that does not exist, a value out of bounds, a checkpoint that
is incomplete or not understood. No weight is read and no cluster is needed.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.config import AppConfig, EngineKind
from deployments.router.keys import find_keys
from llm.config import describe
from llm.errors import ConfigError, LLMError
from llm.models.loading import check_checkpoint
from llm.models.registry import load_model_config

_BUILDER = "deployments.app:build_app"


def check_config_file(path: Path) -> list[AppConfig]:
    """Check every Rayline application of a Serve configuration file; return their arguments.

    Raises:
        CheckpointError, ConfigError: what is wrong and how to mend it, in one line.
    """
    configs = []
    for application in _applications(path):
        try:
            config = AppConfig.model_validate(application.get("args") or {})
        except ValidationError as error:
            raise ConfigError(f"{path}: args of application {application.get('name')!r}: {describe(error)}") from error
        find_keys(config)
        check_model(config)
        configs.append(config)
    return configs


def check_model(config: AppConfig) -> None:
    """Find mistakes here, in one line, that would else stop every replica after a while.

    Raises:
        CheckpointError, ConfigError: the checkpoint is here, and cannot be used.
    """
    if not Path(config.model).is_dir():
        return
    if config.engine_kind is EngineKind.TORCH:
        check_checkpoint(config.model)
    else:
        load_model_config(config.model)


def _applications(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or not all(isinstance(item, dict) for item in applications):
        raise ConfigError(f"{path} has no list of applications; see serve_config.yaml for one that works")
    ours = [item for item in applications if item.get("import_path") == _BUILDER]
    if not ours:
        raise ConfigError(f"{path} has no application with import_path: {_BUILDER}")
    return ours


def main() -> None:
    """Check the files named on the command line."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths or any(str(path).startswith("-") for path in paths):
        sys.exit(__doc__)
    try:
        for path in paths:
            check_config_file(path)
    except LLMError as error:
        sys.exit(f"rayline: {error}")


if __name__ == "__main__":
    main()
