"""Ray Serve's HTTP front end: where it listens, and whether it may do so without keys."""

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from deployments.config import AppConfig
from llm.errors import ConfigError

logger = logging.getLogger("ray.serve")

_SERVES_HOST, _SERVES_PORT = "0.0.0.0", 8000
"""Where Serve listens if its configuration file does not say so."""


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """Serve's HTTP front end, as its `http_options` describe it.

    With HAProxy in front, this is the same: on Ray 2.60, HAProxy and the routers behind it listen on `host`. Only
    HAProxy's statistics and metrics are on every interface.
    """

    host: str
    port: int
    root_path: str = ""

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Self:
        """Build it from the `http_options` of a configuration file.

        Raises:
            ConfigError: they cannot be used.
        """
        host, port = options.get("host", _SERVES_HOST), options.get("port", _SERVES_PORT)
        if not isinstance(host, str) or not host:
            raise ConfigError(f"http_options.host must be an address or a name, not {host!r}")
        if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 1 << 16:
            raise ConfigError(f"http_options.port must be a number from 1 to 65535, not {port!r}")
        return cls(host, port, str(options.get("root_path") or ""))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """Base address as seen from the same machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.root_path}"


def find_front_end() -> FrontEnd | None:
    """Where Serve listens; None if Serve does not run yet.

    Connects to Ray and starts it if none runs, as `serve run module:app` does right after. Otherwise nothing could tell
    whether the cluster has GPUs.
    """
    try:
        from ray.serve.context import _get_global_client

        options = _get_global_client().http_config
    except Exception:  # noqa: BLE001 - no public way to ask: whatever goes wrong, the answer is "not known"
        return None
    return FrontEnd(options.host, options.port, options.root_path) if options.host else None


def check_open(config: AppConfig, has_keys: bool, front_end: FrontEnd | None) -> None:
    """Check that a port which other machines can reach asks for keys.

    Raises:
        ConfigError: it does not, and the configuration does not say that this is intended.
    """
    if has_keys or front_end is None or front_end.is_local:
        return
    where = f"the HTTP port listens on {front_end.host}:{front_end.port}, where other machines reach it"
    if not config.allow_open_without_keys:
        raise ConfigError(
            f"{where}, and no API keys are set. Set api_keys_env or api_keys_file; or listen on 127.0.0.1 "
            "(http_options.host); or set allow_open_without_keys: true"
        )
    logger.warning("%s, and everyone may use it: no API keys are set", where)
