"""`BatchDesk`: files and batches of one store, as a router uses them."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deployments.batches.errors import BatchStoreAwayError
from deployments.batches.file_shelf import FileShelf
from deployments.batches.ledger import BatchLedger
from deployments.batches.open_store import open_store
from deployments.batches.store import Store
from deployments.batches_config import BatchesConfig

T = TypeVar("T")

_THREADS = 8


class BatchDesk:
    """Files and batches. Whatever reads or writes the store goes through `run`, which keeps it off the event loop.

    Args:
        store: where everything is.
        config: bounds.
        clock: seconds since 1970.
    """

    def __init__(self, store: Store, config: BatchesConfig, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.config = config
        self.clock = clock
        self.files = FileShelf(store, config, clock)
        self.ledger = BatchLedger(store, self.files, config, clock)
        self.changed = asyncio.Event()
        """Set when a batch has been made or shall end, so that nobody has to wait for the next look at the store."""
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="batches")

    async def run(self, work: Callable[[], T]) -> T:
        """Do what blocks, in a thread.

        Raises:
            BatchStoreAwayError: the store cannot be read or written.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BatchStoreAwayError(f"Files and batches cannot be reached at the moment: {reason}") from error

    def sweep(self) -> None:
        """Delete what has been kept for long enough. Blocks."""
        self.files.sweep({active.input_file_id for active in self.ledger.all_active()})
        self.ledger.sweep()

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def own_desk(config: BatchesConfig) -> BatchDesk | None:
    """The desk that the configuration asks for; None if it asks for none.

    Raises:
        ConfigError: the store cannot be used; one line with the fix.
    """
    return BatchDesk(open_store(config.store), config) if config.store is not None else None
