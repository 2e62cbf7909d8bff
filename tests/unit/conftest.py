"""What all unit tests share."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing about what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

gc.disable()  # until all tests are collected: what is made until then stays


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as the tests' are faster on one thread, far faster where cores are shared.

    An engine replica takes all cores when it starts. In this process all later tests would have its threads, which spin
    for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)
        patch.setenv("OMP_NUM_THREADS", "1")  # for processes that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def loaded_once() -> None:
    """What all these modules are made of stays: half a second's work for each look of the garbage collector at it."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test goes first, or in the end it would run while the other processes have nothing left to do."""
    items.sort(key=lambda item: item.name != "test_kernels_compile_for_a_gpu")
