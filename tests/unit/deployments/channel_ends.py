"""Both ends of a token channel in one process, over real sockets, and what lies between them."""

import asyncio
import time
from collections.abc import Callable

from deployments.channel.listener import TokenListener
from deployments.channel.messages import Report, TokenItem
from deployments.channel.sender import TokenSender
from llm.scheduling.slot_pool import ContentChanges
from llm.serving.schemas import EngineStats

STATS = EngineStats(1, 2, 3, 4, 5, 6, 15, 16, 0, 7, 8, 9)


class Sink:
    """A router's end that keeps what comes."""

    def __init__(self, replica_id: str = "replica") -> None:
        self._replica_id = replica_id
        self.items: list[TokenItem] = []
        self.reports: list[Report] = []
        self.listener = TokenListener("127.0.0.1", 0, on_items=self.take, on_report=self.reports.append)

    def take(self, replica_id: str, items: list[TokenItem]) -> None:
        assert replica_id == self._replica_id
        self.items += items

    def tokens(self, stream_id: int) -> list[int]:
        """A stream's tokens; fails on a gap, and on a token that comes twice."""
        token_ids: list[int] = []
        for item in self.items:
            if item.stream_id == stream_id:
                assert item.offset == len(token_ids), "each token comes once, in order"
                token_ids += item.token_ids
        return token_ids


def report(sender: TokenSender) -> None:
    """What the engine loop does ten times a second."""
    sender.report(STATS, ContentChanges(), [])


async def wait_for(condition: Callable[[], object], sender: TokenSender | None = None, timeout_s: float = 10) -> float:
    """Wait until a condition holds, while `sender` sends and reports as an engine loop's does; returns the seconds."""
    started = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            if sender is not None:
                sender.flush()
                report(sender)
                await asyncio.sleep(0.05)
            else:
                await asyncio.sleep(0.002)
    return time.monotonic() - started


class Relay:
    """A wire between a sender and a listener that can be cut, and that can fall silent as a vanished node does."""

    def __init__(self, endpoint: str) -> None:
        self._port = int(endpoint.rpartition(":")[2])
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._passes = asyncio.Event()
        self._passes.set()
        self._server: asyncio.Server | None = None
        self.endpoint = ""

    async def open(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def fall_silent(self) -> None:
        """Nothing passes any more, and nothing breaks."""
        self._passes.clear()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        router_reader, router_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, router_writer]
        for source, target in ((reader, router_writer), (router_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()
