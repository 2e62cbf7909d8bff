"""Embeddings: a prompt's hidden states, pooled to one vector."""

from collections.abc import Sequence
from enum import StrEnum

import torch

from llm.attention.dense import DenseContext
from llm.models.decoder import DecoderModel


class Pooling(StrEnum):
    """Which hidden states make the vector."""

    LAST = "last"
    """The last token's."""
    MEAN = "mean"
    """The average of all."""


class Embedding:
    """One prompt's vector, computed chunk by chunk, so that others may run between two chunks.

    Args:
        model: in evaluation mode.
        token_ids: at least one.
        pooling: of the final hidden states.
        chunk_len: tokens a chunk.
    """

    def __init__(self, model: DecoderModel, token_ids: Sequence[int], pooling: Pooling, *, chunk_len: int) -> None:
        self._model = model
        self._chunks = list(torch.split(torch.tensor(token_ids, device=model.device), chunk_len))
        self._pooling = pooling
        self._caches = model.make_kv_caches(1, len(token_ids)) if len(self._chunks) > 1 else None
        self._start = 0
        self._sum = torch.zeros(model.hidden_size, dtype=torch.float32, device=model.device)

    @torch.inference_mode()
    def advance(self) -> list[float] | None:
        """Compute the next chunk; the vector, of length 1, once it was the last, else None."""
        chunk = self._chunks.pop(0)
        positions = torch.arange(self._start, self._start + len(chunk), device=chunk.device)
        self._start += len(chunk)
        windows = [self._model.config.layer_window(layer) for layer in range(self._model.num_layers)]
        context = DenseContext(windows, self._caches)
        hidden = self._model.hidden_states(chunk.unsqueeze(0), positions, context)[0].float()
        self._sum = self._sum + hidden.sum(0) if self._pooling is Pooling.MEAN else hidden[-1]
        if self._chunks:
            return None
        vector: list[float] = torch.nn.functional.normalize(self._sum, dim=0).tolist()
        return vector
