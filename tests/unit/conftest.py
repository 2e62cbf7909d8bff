"""What all unit tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

# Where there is no GPU, kernels run in Triton's interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as the tests' are faster on one thread, far faster where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
