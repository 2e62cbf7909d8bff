"""`KVCache`: keys and values of one layer, pre-allocated and written in place."""

from collections.abc import Iterable
from typing import Protocol, Self

import torch

from llm.errors import CapacityError

_WINDOW_SLACK = 64


class KVCache:
    """Keys and values of one layer for a batch of sequences of equal length.

    All memory is allocated up front; `append` writes in place and returns views. With a `window_size` only the last
    tokens are kept: the buffer holds `window_size` plus a quarter, and when it is full the last `window_size - 1`
    tokens move to its front, so memory is O(window) and each token is moved four times on average.

    Attributes:
        length: tokens seen so far by every sequence of the batch.
        value_dim: width of the values, which need not be that of the keys; 0 for keys alone.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        window_size: int | None = None,
        value_dim: int | None = None,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_seq_len", max_seq_len),
            ("window_size", window_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.window_size = window_size
        capacity = max_seq_len
        if window_size is not None:
            capacity = min(max_seq_len, window_size + max(window_size // 4, _WINDOW_SLACK))
        shape = (max_batch_size, num_kv_heads, capacity, head_dim)
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self.value_dim = head_dim if value_dim is None else value_dim
        self._values = torch.zeros((*shape[:-1], self.value_dim), device=device, dtype=dtype)
        self.reset()

    @classmethod
    def from_model_config(
        cls,
        max_batch_size: int,
        max_seq_len: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        window_size: int | None = None,
    ) -> list[Self]:
        """Make one cache a layer. See `DecoderModel.make_kv_caches` for a model's own windows."""
        return [
            cls(max_batch_size, max_seq_len, num_kv_heads, head_dim, device, dtype, window_size)
            for _ in range(num_layers)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self._keys.nbytes + self._values.nbytes

    def reset(self) -> None:
        """Forget every token. The memory stays allocated."""
        self.length = 0
        self._num_stored = 0
        self._batch_size: int | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values of new tokens.

        Args:
            key, value: (batch, num_new, num_kv_heads, head_dim), values `value_dim` wide.

        Returns:
            Keys and values to attend to, (batch, num_kv_heads, num_visible, head_dim) each, in order of position; the
            last is the newest token. All tokens so far, or with a window at least every one that the window covers.

        Raises:
            CapacityError: more tokens than `max_seq_len`, or a larger batch than `max_batch_size`. Nothing is stored.
        """
        batch_size, num_new = key.shape[:2]
        self._check_room(batch_size, num_new)
        self.length += num_new
        self._batch_size = batch_size
        key, value = key.detach().transpose(1, 2), value.detach().transpose(1, 2)
        if self._num_stored + num_new > self._keys.shape[2]:
            return self._slide(key, value)
        end = self._num_stored + num_new
        visible = []
        for buffer, new in ((self._keys, key), (self._values, value)):
            buffer[:batch_size, :, self._num_stored : end] = new
            visible.append(buffer[:batch_size, :, :end])
        self._num_stored = end
        return visible[0], visible[1]

    def _slide(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append where the buffer is too short for old and new: move the window's tail to the front."""
        assert self.window_size is not None
        batch_size = key.shape[0]
        num_kept = min(self.window_size - 1, self._num_stored)
        visible = []
        for buffer, new in ((self._keys, key), (self._values, value)):
            kept = buffer[:batch_size, :, self._num_stored - num_kept : self._num_stored]
            both = torch.cat([kept, new.to(buffer.dtype)], dim=2)
            num_stored = min(both.shape[2], self.window_size)
            buffer[:batch_size, :, :num_stored] = both[:, :, -num_stored:]
            visible.append(both)
        self._num_stored = min(num_kept + key.shape[2], self.window_size)
        return visible[0], visible[1]

    def _check_room(self, batch_size: int, num_new: int) -> None:
        if batch_size > self.max_batch_size:
            raise CapacityError(
                f"batch of {batch_size} sequences; this KVCache holds max_batch_size={self.max_batch_size}"
            )
        if self._batch_size is not None and batch_size != self._batch_size:
            raise CapacityError(
                f"batch of {batch_size} sequences after one of {self._batch_size}; reset the caches between batches"
            )
        if self.length + num_new > self.max_seq_len:
            raise CapacityError(
                f"{self.length} tokens stored and {num_new} new ones exceed max_seq_len={self.max_seq_len}; "
                "make the KVCache longer, or reset it for a new sequence"
            )


class _Cache(Protocol):
    def reset(self) -> None: ...


def reset_all_caches(caches: Iterable[_Cache]) -> None:
    """Forget every token in every layer, ready for a new sequence."""
    for cache in caches:
        cache.reset()
