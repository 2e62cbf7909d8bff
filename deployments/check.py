"""Says in one line what is wrong with a configuration file, before anything starts.

    python -m deployments.check serve_config.yaml
    python -m deployments.check --start serve_config.yaml

Exits with 1 where `serve run` could not serve it: a key that does not exist, a value out of bounds, a port open to
other machines without API keys, a checkpoint that is incomplete or not understood; with --start also a port that is in
use. No weight is read and no cluster is needed.
"""

import sys
from pathlib import Path

from deployments.serve.config_file import check_config_file
from deployments.serve.ports import check_port
from llm.errors import LLMError


def main() -> None:
    """Check the files named on the command line."""
    arguments = sys.argv[1:]
    is_starting = arguments[:1] == ["--start"]
    paths = [Path(argument) for argument in arguments[is_starting:]]
    if not paths or any(str(path).startswith("-") for path in paths):
        sys.exit(__doc__)
    try:
        for path in paths:
            server = check_config_file(path)
            if is_starting:
                check_port(server.front_end)
    except LLMError as error:
        sys.exit(f"rayline: {error}")


if __name__ == "__main__":
    main()
