"""Threads that prepare requests, shared by all models of a router process."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_BYTES = 2_000
"""Requests up to this size are read at once: handing them to a thread would take longer."""
_LONG_BYTES = 64 << 10


class TokenizerThreads:
    """Runs what would hold up the event loop.

    Args:
        num_threads: threads for requests of common sizes; there is one more for long ones.
    """

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._thread_for_long = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Do work on a request of this size without holding up the event loop.

        Args:
            size: size of the request's body, in bytes.
            work: must hold the interpreter's lock for only a few milliseconds at a time.
        """
        if size <= INLINE_BYTES:
            return work()
        # A request that takes seconds must not keep short ones waiting.
        threads = self._threads if size <= _LONG_BYTES else self._thread_for_long
        return await asyncio.get_running_loop().run_in_executor(threads, work)
