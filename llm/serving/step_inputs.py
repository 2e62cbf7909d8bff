"""Everything the host tells the device about a step, in one copy."""

from collections.abc import Mapping
from itertools import accumulate

import torch

from llm.kernels.attention.work import StepParts
from llm.models.packed_step import StepTokens
from llm.serving.step_arrays import Int32Array


class StepInputs:
    """Persistent int32 tensors on the device, which captured graphs read, and pinned memory to fill them from.

    Args:
        sizes: number of elements of each field.
        device: device of the tensors.
        num_buffers: copies that may be in progress at once, plus one to fill.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device, num_buffers: int) -> None:
        total = sum(sizes.values())
        self._device_buffer = torch.zeros(total, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._host_buffers = [torch.zeros(total, dtype=torch.int32, pin_memory=pin) for _ in range(num_buffers)]
        ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
        self._tensors = {field: self._device_buffer[end - sizes[field] : end] for field, end in ends.items()}
        self._arrays: list[dict[str, Int32Array]] = [
            {field: buffer.numpy()[end - sizes[field] : end] for field, end in ends.items()}
            for buffer in self._host_buffers
        ]
        self._next = 0

    def __getitem__(self, field: str) -> torch.Tensor:
        return self._tensors[field]

    def next_arrays(self) -> dict[str, Int32Array]:
        """Arrays to fill for the next step, by field; they still hold old values."""
        self._next = (self._next + 1) % len(self._arrays)
        return self._arrays[self._next]

    def upload(self) -> None:
        """Send the arrays that were filled last; steps launched from now on see them."""
        self._device_buffer.copy_(self._host_buffers[self._next], non_blocking=True)

    def upload_padding(self, padding_row: int) -> None:
        """Send a step whose tokens, parts and draws belong to no sequence."""
        for field, array in self.next_arrays().items():
            array[:] = padding_row if field.endswith("rows") else 0
        self.upload()

    def tokens(self, num_tokens: int) -> StepTokens:
        """The first `num_tokens` tokens."""
        return StepTokens(
            self["token_ids"][:num_tokens], self["positions"][:num_tokens], self["token_rows"][:num_tokens]
        )

    def parts(self, num_parts: int) -> StepParts:
        """The first `num_parts` parts."""
        return StepParts(
            self["part_rows"][:num_parts],
            self["query_starts"][:num_parts],
            self["query_lens"][:num_parts],
            self["context_lens"][:num_parts],
        )


def fill(array: Int32Array, values: Int32Array, padded_len: int, padding: int) -> None:
    """Write `values`, then `padding` up to `padded_len`."""
    array[: len(values)] = values
    array[len(values) : padded_len] = padding
