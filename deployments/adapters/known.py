"""`KnownAdapters`: the adapters that one router knows, kept equal to the catalog's."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from deployments.adapters.messages import Ask, KnownAdapter, LoadOrder, OrderRefusal, Outcome, Reply, Wish
from deployments.errors import CatalogAwayError

logger = logging.getLogger("ray.serve")

_INTERVAL_S = 0.5
_TIMEOUT_S = 2.0
_MOST_WAIT_S, _WAIT_INTERVAL_S = 10.0, 0.05


class CatalogClient(Protocol):
    """How a router reaches the catalog. Each method raises CatalogAwayError where it cannot be reached."""

    async def exchange(self, ask: Ask) -> Reply:
        """See `Catalog.exchange`."""
        ...

    async def load(self, order: LoadOrder) -> Outcome:
        """See `Catalog.load`."""
        ...

    async def unload(self, name: str) -> Outcome:
        """See `Catalog.unload`."""
        ...


class KnownAdapters:
    """The adapters that requests to one router may name. Lives on the router's event loop.

    What it knows stays valid while the catalog is away or has just started. It remembers what administrators asked for,
    for a catalog that has forgotten it.

    Args:
        client: the catalog; None where no model takes adapters.
        clock: seconds; monotonic.
    """

    def __init__(self, client: CatalogClient | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_away = False
        self._client = client
        self._clock = clock
        self._adapters: dict[str, tuple[KnownAdapter, ...]] = {}
        self._names: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._wishes: dict[str, Wish] = {}
        self._incarnation, self._revision = "", -1
        self._is_settled = client is None
        self._asking = asyncio.Lock()
        self._asked_at = -1.0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_current(self) -> bool:
        """Whether it knows what the catalog knew at the last exchange, and the catalog knows everything."""
        return self._client is not None and self._is_settled and not self.is_away

    @property
    def takes_orders(self) -> bool:
        """Whether there is a catalog, and so any model that takes adapters."""
        return self._client is not None

    @property
    def is_settled(self) -> bool:
        """Whether an adapter that it does not know is not there; False while the first ones are still being read."""
        return self._is_settled

    def start(self) -> None:
        """Begin to follow the catalog."""
        if self._client is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow())

    async def wait_until_settled(self) -> None:
        """Wait until the first adapters are read, for a while: routers that are to be replaced serve meanwhile, and
        tell the catalog what they remember."""
        deadline = self._clock() + _MOST_WAIT_S
        while not self._is_settled and self._clock() < deadline:
            await asyncio.sleep(_WAIT_INTERVAL_S)

    def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()

    def find(self, name: str) -> tuple[KnownAdapter, ...]:
        """The adapters of this name, one for each entry of its model that takes it; none if there is no such name."""
        return self._adapters.get(name, ())

    async def find_anew(self, name: str) -> tuple[KnownAdapter, ...]:
        """As `find`; before it says that there is none, it asks the catalog."""
        if name not in self._adapters and self._client is not None:
            await self.refresh()
        return self.find(name)

    def all(self) -> Sequence[tuple[KnownAdapter, ...]]:
        """The adapters of each name, as `find` returns them, in the order of the names."""
        return [self._adapters[name] for name in sorted(self._adapters)]

    def digests(self, key: str) -> set[str]:
        """Digests of all adapters of an entry of `models`."""
        return {adapter.digest for found in self._adapters.values() for adapter in found if adapter.key == key}

    def names_of(self, digests: Iterable[str]) -> list[str]:
        """A name of each adapter with one of these digests, in order; those that have no name anymore are left out."""
        return sorted(self._names[digest] for digest in digests if digest in self._names)

    async def load(self, order: LoadOrder) -> OrderRefusal | None:
        """Let requests name another adapter from now on; returns why not, if not.

        Raises:
            CatalogAwayError: the catalog cannot be reached now.
        """
        return await self._order(self._catalog().load(order))

    async def unload(self, name: str) -> OrderRefusal | None:
        """Let requests no longer name an adapter; returns why not, if not.

        Raises:
            CatalogAwayError: the catalog cannot be reached now.
        """
        return await self._order(self._catalog().unload(name))

    async def refresh(self) -> None:
        """Ask the catalog for what is new, in an exchange that begins after this call. No effect while it is away."""
        wanted_at = self._clock()
        async with self._asking:
            if self._asked_at < wanted_at:  # otherwise the one before in the line has asked
                self._asked_at = self._clock()
                await self._exchange()

    def snapshot(self) -> dict[str, Any]:
        """State, for `Router.snapshot`."""
        return {
            "num_adapters": len(self._adapters),
            "adapter_faults": self._faults,
            "is_adapter_catalog_away": self.is_away,
        }

    def _catalog(self) -> CatalogClient:
        if self._client is None:
            raise CatalogAwayError("no model takes adapters")
        return self._client

    async def _order(self, order: Awaitable[Outcome]) -> OrderRefusal | None:
        outcome = await order
        if outcome.wish is not None:
            self._remember(outcome.wish)
            await self.refresh()
        return outcome.refusal

    async def _follow(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                logger.exception("the catalog of adapters cannot be asked; trying again")
            await asyncio.sleep(_INTERVAL_S)

    async def _exchange(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reply = await self._catalog().exchange(Ask(self._incarnation, self._revision))
                if reply.incarnation != self._incarnation and self._wishes:  # it may know nothing of them
                    reply = await self._catalog().exchange(Ask("", -1, list(self._wishes.values())))
        except (CatalogAwayError, TimeoutError) as error:
            if not self.is_away:
                logger.warning("the catalog of adapters is away (%s): they stay as they are", error or "no answer")
            self.is_away = True
            return
        self.is_away = False
        self._take(reply)

    def _take(self, reply: Reply) -> None:
        if reply.adapters is None:
            self._is_settled = reply.is_settled
            return
        for wish in reply.wishes or ():
            self._remember(wish)
        if reply.incarnation != self._incarnation and self._is_settled and not reply.is_settled:
            return  # a catalog that has just started knows less than this router
        self._incarnation, self._revision = reply.incarnation, reply.revision
        self._is_settled = reply.is_settled
        self._adapters = {}
        for adapter in reply.adapters:
            self._adapters[adapter.name] = (*self.find(adapter.name), adapter)
        self._names = {adapter.digest: adapter.name for adapter in reversed(reply.adapters)}
        self._faults = reply.faults

    def _remember(self, wish: Wish) -> None:
        known = self._wishes.get(wish.name)
        if known is None or known.number < wish.number:
            self._wishes[wish.name] = wish
