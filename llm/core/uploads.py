"""Values of the host's on their way to the device, for which the host does not wait."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16
"""Bytes, of the greatest number that is sent."""


class Uploads:
    """Pinned memory for what one step sends, and for the steps still in flight.

    Pinned memory that is only allocated when it is needed makes the device and the host wait for each other, so this
    is allocated at the start. What does not fit gets memory of its own.

    Args:
        device: where values go; on a CPU nothing is pinned.
        num_bytes: that a step usually sends at most.
        num_buffers: steps that may be in flight, plus one to fill.
    """

    def __init__(self, device: torch.device, num_bytes: int, num_buffers: int) -> None:
        self._device = device
        self._pin = device.type == "cuda"
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pin) for _ in range(num_buffers)]
        self._next = 0
        self._used = 0

    def begin_step(self) -> None:
        """Reuse the memory of the oldest step, which must be over."""
        self._next = (self._next + 1) % len(self._buffers)
        self._used = 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the host's to fill and `send` within this step; it holds what was left in it."""
        num_bytes = math.prod(shape) * dtype.itemsize
        end = self._used + num_bytes
        if end <= len(self._buffers[self._next]):
            buffer = self._buffers[self._next][self._used : end]
            self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        else:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pin)
        return buffer.view(dtype).view(shape)

    def send(self, values: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
        """Copy values to the device; kernels launched from now on see them.

        Args:
            values: an array, which may be changed as soon as this returns; or what `tensor` gave.
        """
        if isinstance(values, np.ndarray):
            given = torch.from_numpy(values)
            values = self.tensor(given.shape, given.dtype).copy_(given)
        return values.to(self._device, non_blocking=True)
