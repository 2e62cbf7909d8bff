"""`Quotas`: one router's accounts, and their exchanges with the accountant."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import Enum, auto
from typing import Protocol

from deployments.config import AwayPolicy
from deployments.errors import AccountantAwayError
from deployments.router.accountant import Accountant
from deployments.router.accounts import Account, Refusal
from deployments.router.keys import ApiKey
from deployments.router.leases import Ask, Reply

logger = logging.getLogger("ray.serve")

_INTERVAL_S, _IDLE_INTERVAL_S, _SHORTEST_INTERVAL_S = 0.25, 1.0, 0.01
_RECOVERY_INTERVAL_S = 0.1
_TIMEOUT_S = 1.0
_PATIENCE_S = 2.0
_RELEASE_ON_ITS_WAY_S = 0.05


class AccountantClient(Protocol):
    """How a router reaches the accountant."""

    is_shared: bool
    """Whether other routers reach the same one."""

    async def exchange(self, ask: Ask) -> Reply:
        """See `Accountant.exchange`.

        Raises:
            AccountantAwayError: it cannot be reached now.
        """
        ...


class OwnAccountant:
    """The accountant of a router that is the only one, in its own process."""

    is_shared = False

    def __init__(self) -> None:
        self._accountant = Accountant()

    async def exchange(self, ask: Ask) -> Reply:
        """See `AccountantClient`."""
        return self._accountant.exchange(ask)


class _Answer(Enum):
    LET_IN = auto()
    REFUSED = auto()
    UNKNOWN = auto()


_Waiters = dict[str, list["asyncio.Future[_Answer]"]]


class Quotas:
    """Lets requests in as far as their key's limits allow. Lives on the router's event loop.

    One exchange runs at a time: requests that need more than their router has in hand wait for the next exchange, in
        order of arrival. Others are let in at once.

    Args:
        accountant: who leases the limits.
        when_away: what happens to requests that need more than is in hand while the accountant cannot be reached.
        clock: seconds; monotonic.
    """

    def __init__(
        self,
        accountant: AccountantClient,
        when_away: AwayPolicy = AwayPolicy.OPEN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_away = False
        self._accountant = accountant
        self._when_away = when_away
        self._clock = clock
        self._router_id = uuid.uuid4().hex
        self._number = 0
        self._incarnation = ""
        self._accounts: dict[str, Account] = {}
        self._waiting: _Waiters = {}
        self._asking: _Waiters = {}
        self._need = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def account(self, key: ApiKey) -> Account:
        """The account of a key, opened if there is none. It is kept, whatever happens to the key."""
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = Account(key, self._clock, self._need.set)
        return account

    def opened(self, name: str) -> Account | None:
        """The account of the key with this name; None if nobody has asked for it, so nothing runs with the key."""
        return self._accounts.get(name)

    def start(self) -> None:
        """Begin the exchanges with the accountant. No effect if they have begun."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._exchange_for_ever())

    def close(self) -> None:
        """Stop the exchanges."""
        if self._task is not None:
            self._task.cancel()

    async def enter(self, account: Account) -> Refusal | None:
        """Open a request, which must `leave` later, or say why it cannot be opened.

        Raises:
            AccountantAwayError: the accountant cannot be reached, and requests are to be refused meanwhile.
        """
        is_first = account.key.name not in self._waiting and account.key.name not in self._asking
        if is_first and account.try_enter():
            return None
        if is_first and (refusal := account.fresh_refusal()):
            return refusal
        answer = await self._ask_for_entry(account)
        if answer is _Answer.REFUSED and self._accountant.is_shared and account.refusal().limit == "concurrency":
            await asyncio.sleep(_RELEASE_ON_ITS_WAY_S)  # another router may just have answered this client
            answer = await self._ask_for_entry(account)
        if answer is _Answer.LET_IN:
            return None
        if answer is _Answer.REFUSED:
            return account.refusal()
        if self._when_away is AwayPolicy.CLOSED:
            raise AccountantAwayError("The limits of this API key cannot be checked now; try again in a few seconds")
        return account.try_enter_alone()

    async def _ask_for_entry(self, account: Account) -> _Answer:
        """Wait for the next exchange."""
        self.start()
        if self.is_away:
            return _Answer.UNKNOWN
        waiter: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account.key.name, []).append(waiter)
        self._need.set()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await waiter
        except (asyncio.CancelledError, TimeoutError) as error:
            if waiter.done() and not waiter.cancelled() and waiter.result() is _Answer.LET_IN:
                account.leave()  # it was given up at the same moment
            if isinstance(error, TimeoutError):
                return _Answer.UNKNOWN
            raise

    async def _exchange_for_ever(self) -> None:
        while True:
            is_busy = self.is_away or any(account.has_news for account in self._accounts.values())
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL_S if is_busy else _IDLE_INTERVAL_S):
                    await self._need.wait()
            self._need.clear()
            try:
                await self._exchange()
            except AccountantAwayError as error:
                self._note_away(str(error))
            except Exception:
                logger.exception("the limits of API keys cannot be exchanged with the accountant")
                self._note_away("an error")
            if not self._waiting:
                await asyncio.sleep(_SHORTEST_INTERVAL_S)

    async def _exchange(self) -> None:
        """State what is held, take what is granted, and let in or refuse the waiting requests.

        Raises:
            AccountantAwayError: there is no answer.
        """
        self._asking, self._waiting = self._waiting, {}
        names = [account.key.name for account in self._accounts.values() if account.has_news]
        reply = await self._ask({*names, *self._asking})
        if reply.incarnation != self._incarnation:  # it knows nothing of what is held and used
            self._incarnation = reply.incarnation
            reply = await self._ask(self._accounts, with_level=True)
        if self.is_away:
            logger.info("the accountant of the API keys' limits is back")
            self.is_away = False
        if reply.is_recovering:
            for name, waiters in self._asking.items():
                self._waiting[name] = waiters + self._waiting.get(name, [])
            self._asking = {}
            await asyncio.sleep(_RECOVERY_INTERVAL_S)
            self._need.set()
            return
        for grant in reply.grants:
            self._accounts[grant.key].take(grant)
        asking, self._asking = self._asking, {}
        for name, waiters in asking.items():
            _let_in(self._accounts[name], waiters)

    async def _ask(self, names: Iterable[str], *, with_level: bool = False) -> Reply:
        """One exchange about these accounts.

        Raises:
            AccountantAwayError: there is no answer.
        """
        accounts = [self._accounts[name] for name in names]
        claims = []
        for account in accounts:
            num_waiting = sum(not waiter.done() for waiter in self._asking.get(account.key.name, ()))
            claims.append(account.claim(num_waiting, with_level=with_level))
        self._number += 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._accountant.exchange(Ask(self._router_id, self._number, self._incarnation, claims))
        except BaseException as error:
            for account in accounts:
                account.touch()  # the accountant may not have heard what was just stated
            if isinstance(error, TimeoutError):
                raise AccountantAwayError(f"no answer within {_TIMEOUT_S:g} s") from None
            raise

    def _note_away(self, why: str) -> None:
        """Note that nothing is granted until the next successful exchange."""
        if not self.is_away:
            fate = "refused" if self._when_away is AwayPolicy.CLOSED else "counted by each router alone"
            logger.warning("the accountant of the API keys' limits is away (%s): requests are %s", why, fate)
        self.is_away = True
        for account in self._accounts.values():
            account.drop_idle_permits()
        for waiters in (*self._asking.values(), *self._waiting.values()):
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(_Answer.UNKNOWN)
        self._asking, self._waiting = {}, {}


def _let_in(account: Account, waiters: Iterable["asyncio.Future[_Answer]"]) -> None:
    """Open the requests for which there is enough in hand; refuse the rest."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(_Answer.LET_IN if account.try_enter() else _Answer.REFUSED)
