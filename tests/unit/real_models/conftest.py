"""Real models, downloaded by `make models`.

Without them these tests are skipped, unless REAL_MODELS=required, as `make test` says: then they fail.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.checkpoint.packaged_models import find_packaged_model


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """`real_model(name)` gives the GGUF file of that name of `PACKAGED_MODELS`."""

    def find(name: str) -> Path:
        path = find_packaged_model(name)
        if path is None:
            message = f"the real model {name} is not in the cache; download it with: make models"
            if os.environ.get("REAL_MODELS") == "required":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find
