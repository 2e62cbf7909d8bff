"""Models on a part of a GPU: how much memory each takes, and what is said of parts that do not fit."""

import pytest
from pydantic import ValidationError

from deployments.config import AppConfig
from deployments.model_config import ServedModelConfig
from deployments.replica.gpu_sharing import sharing_notes
from llm.config import EngineConfig
from llm.serving.memory import pool_bytes

GIB = 1 << 30


def model(num_gpus: float | None, **changes: object) -> ServedModelConfig:
    replicas = {"num_gpus": num_gpus, **changes.pop("replicas", {})}  # type: ignore[dict-item]
    return ServedModelConfig.model_validate({"model": "a", "replicas": replicas, **changes})


def notes(**models: ServedModelConfig) -> str:
    return "\n".join(sharing_notes(models))


def test_on_a_gpu_of_its_own_an_engine_counts_all_that_is_in_use():
    """80 GiB, 90 % of it for the engine, 20 GiB in use by whomever."""
    config = EngineConfig(gpu_memory_utilization=0.9)
    assert pool_bytes(config, total=80 * GIB, free=60 * GIB, reserved=15 * GIB) == 72 * GIB - 20 * GIB


def test_on_a_shared_gpu_the_others_memory_is_not_the_engines():
    """Its half of 80 GiB, 90 % of that, less its own 15 GiB and the context: the same whether the other has loaded."""
    config = EngineConfig(gpu_memory_utilization=0.9, gpu_share=0.5)
    alone = pool_bytes(config, total=80 * GIB, free=64 * GIB, reserved=15 * GIB)
    assert alone == pool_bytes(config, total=80 * GIB, free=28 * GIB, reserved=15 * GIB) == 36 * GIB - 16 * GIB


def test_it_takes_no_more_than_the_others_have_left():
    config = EngineConfig(gpu_memory_utilization=0.9, gpu_share=0.5)
    assert pool_bytes(config, total=80 * GIB, free=5 * GIB, reserved=15 * GIB) == 5 * GIB


def test_two_engines_with_halves_never_want_more_than_the_gpu():
    """Whichever loads first: what both may hold, contexts included, is at most 90 % of it."""
    config = EngineConfig(gpu_memory_utilization=0.9, gpu_share=0.5)
    used = 0
    for weights in (10 * GIB, 3 * GIB):
        loaded = weights + GIB
        pool = pool_bytes(config, total=80 * GIB, free=80 * GIB - used - loaded, reserved=weights)
        used += loaded + pool
    assert used <= 72 * GIB


def test_the_share_is_what_ray_sets_aside():
    assert model(0.5).gpu_share == 0.5
    assert [model(num_gpus).gpu_share for num_gpus in (None, 0, 1)] == [1.0, 1.0, 1.0]
    assert model(0.5, engine={"gpu_share": 0.4}).gpu_share == 0.4


def test_parts_that_do_not_fit_on_one_gpu_are_noted():
    assert notes(a=model(0.5), b=model(0.5)) == ""
    assert "take 1.25 of them (a 0.5 + b 0.75)" in notes(a=model(0.5), b=model(0.75))
    assert "they need 2" in notes(a=model(0.5, replicas={"num_replicas": 3}))
    assert notes(a=model(1), b=model(0.5), c=model(None)) == ""


def test_pools_that_no_share_bounds_are_noted():
    assert "a: replicas.num_gpus: 0 sets no GPU aside" in notes(a=model(0, device="cuda"))
    assert notes(a=model(0)) == "", "it runs on a CPU"
    assert "a: engine.num_pages: 100" in notes(a=model(0.5, engine={"num_pages": 100}))
    assert "want 1.6 times" in notes(a=model(0.5, engine={"gpu_share": 0.8}))
    assert notes(a=model(0, device="cuda", engine_kind="emulated")) == ""


@pytest.mark.parametrize("num_gpus", [1.5, 2.25])
def test_several_gpus_are_a_whole_number(num_gpus: float):
    with pytest.raises(ValidationError, match="neither a whole number nor below 1"):
        AppConfig.model_validate({"replicas": {"num_gpus": num_gpus}})
