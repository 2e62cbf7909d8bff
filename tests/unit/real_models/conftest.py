"""Real models, downloaded by `make models`.

Without them these tests are skipped, unless REAL_MODELS=required, as `make test` says: then they fail.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from llm.checkpoint.gguf_weights import GGUFWeights
from llm.checkpoint.hub import resolve_model_path
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


@pytest.fixture(scope="session")
def model_of_transformers() -> Callable[[Path], transformers.PreTrainedModel]:
    """`model_of_transformers(path)` is transformers' model of the weights in a GGUF file, in float32."""

    def load(path: Path) -> transformers.PreTrainedModel:
        config = transformers.AutoConfig.from_pretrained(resolve_model_path(str(path)))
        with GGUFWeights(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        model_class = getattr(transformers, config.architectures[0])
        return model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()

    return load
