"""Gives a deployment a version of its own, so that Ray Serve restarts only what has changed.

Serve gives all deployments of an application one version, made of the application's arguments: where one model changes,
it would restart the replicas of all. Its public API has no way to say otherwise, so this module, alone, uses a private
part of Ray 2.60.
"""

from hashlib import sha256
from typing import Any

import ray
from pydantic import PrivateAttr
from ray.serve import Application
from ray.serve._private.config import DeploymentConfig

from deployments.version import __version__


class _ConfigWithVersion(DeploymentConfig):  # type: ignore[misc]
    """Ray Serve's settings of a deployment, which keep their version when Serve sets the application's."""

    _own_version: str = PrivateAttr(default="")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, self._own_version if name == "version" else value)


def with_own_version(application: Application, *parts: str) -> Application:
    """The application, whose deployment gets a version that depends on these parts alone.

    Args:
        application: bound already; its deployment is changed.
        parts: everything for which its replicas have to be started anew. This program's version and the environment
            that it runs in are added.
    """
    deployment = application._bound_deployment
    environment = ray.get_runtime_context().get_runtime_env_string() if ray.is_initialized() else ""
    version = sha256("\0".join((__version__, environment, *parts)).encode()).hexdigest()
    own = deployment._deployment_config
    fields = {name: getattr(own, name) for name in DeploymentConfig.model_fields}
    config = _ConfigWithVersion.model_construct(own.model_fields_set, **fields)
    config._own_version = version
    config.version = version
    deployment._deployment_config = config
    return application
