"""Ray Serve deployments: the router, the engine replicas and the messages between them."""

from importlib.util import find_spec
from pathlib import Path


def _check_engine() -> None:
    """Refuse another package named `llm`; the package index has one, a command-line tool."""
    spec = find_spec("llm")
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    if not any((place / "serving" / "engine.py").is_file() for place in places):
        found = f"{places[0]} is another one" if places else "there is none"
        raise ImportError(
            f"Rayline needs its own package llm, and {found}: install Rayline into an environment without it"
        )


_check_engine()
