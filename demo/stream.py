"""Training batches made by worker processes while the model trains."""

import itertools
import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import Queue

import numpy as np

from demo.conversations import training_rows

_BATCHES_AHEAD = 8


class BatchStream:
    """An endless stream of `(num_rows, length)` id arrays, in the same order for the same seed and worker count.

    Start it before CUDA is used: the workers are forked. They end with this process, or at `close`.
    """

    def __init__(self, seed: int, num_rows: int, length: int, num_workers: int) -> None:
        context = multiprocessing.get_context("fork")
        self._queues: list[Queue[np.ndarray]] = [context.Queue(_BATCHES_AHEAD) for _ in range(num_workers)]
        self._workers = [
            context.Process(target=_make_batches, args=(queue, f"{seed} {length} {i}", num_rows, length), daemon=True)
            for i, queue in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield one batch of each worker in turn."""
        for queue in itertools.cycle(self._queues):
            yield queue.get()

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()


def _make_batches(queue: "Queue[np.ndarray]", seed: str, num_rows: int, length: int) -> None:
    for number in itertools.count():
        queue.put(training_rows(f"{seed} {number}", num_rows, length))
