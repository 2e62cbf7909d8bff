"""`Access`: which keys are valid now, and what each may still do."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from typing import Any

from deployments.config import AwayPolicy
from deployments.router.accounts import REVOKED, Account, Refusal
from deployments.router.key_file import KeyFile
from deployments.router.keys import ApiKey, KeySource
from deployments.router.meter import Meter
from deployments.router.quotas import AccountantClient, OwnAccountant, Quotas

logger = logging.getLogger("ray.serve")

_LOOK_INTERVAL_S = 0.5
EXPIRED = "The API key of this request has expired"


class Access:
    """Who may use a router, and how much. Create it on the event loop that it is to live on.

    A key that is removed from its file, or gets another secret there, or expires, is refused at once, and requests that
    run with it end with an error. When limits change, what has been used of the old ones still counts.

    Args:
        source: the keys; if there are none, everyone may do everything.
        accountant: who leases the keys' limits to all routers; None if this router is the only one.
        when_away: what happens to requests of keys with limits while the accountant cannot be reached.
        clock: seconds since 1970.
        meter: counts what requests use; None to count in memory. Closed with this.
    """

    def __init__(
        self,
        source: KeySource | None = None,
        accountant: AccountantClient | None = None,
        when_away: AwayPolicy = AwayPolicy.OPEN,
        clock: Callable[[], float] = time.time,
        meter: Meter | None = None,
    ) -> None:
        source = source or KeySource()
        self.clock = clock
        self.meter = meter or Meter(when_away=when_away, clock=clock)
        self._num_changes = 0
        self._quotas = Quotas(accountant or OwnAccountant(), when_away)
        self._file = KeyFile(source) if source.path is not None else None
        self._following: asyncio.Task[None] | None = None
        self._set_keys((self._file.look(is_first=True) if self._file is not None else None) or source.keys)
        if self.keys:
            self._following = asyncio.get_running_loop().create_task(self._follow())
        if accountant is not None:
            self._quotas.start()

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self.keys)

    def named(self, name: str) -> ApiKey | None:
        """The valid key with this name; None if there is none."""
        return self._by_name.get(name)

    def with_secret(self, secret: bytes) -> ApiKey | None:
        """The valid key with this secret; None if there is none.

        It is looked up by its digest, so the time says nothing about the secret of any key.
        """
        digest = hashlib.sha256(secret).digest()
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(digest, key.digest) else None

    def account(self, key: ApiKey) -> Account:
        """The account of what a key has used."""
        return self._quotas.account(key)

    async def enter(self, account: Account) -> Refusal | None:
        """Open a request, which must `leave` later, or say why it cannot be opened.

        Raises:
            AccountantAwayError: the accountant cannot be reached, and the configuration refuses requests meanwhile.
        """
        return await self.meter.budgets.refusal(account.key) or await self._quotas.enter(account)

    def change_keys(self, keys: tuple[ApiKey, ...]) -> None:
        """Replace the valid keys from now on."""
        old = self._by_name
        self._set_keys(keys)
        new = self._by_name
        self._num_changes += 1
        revoked = [key for key in old.values() if key.name not in new or new[key.name].digest != key.digest]
        num_ended = sum(self._end(key, is_gone=key.name not in new, why=REVOKED) for key in revoked)
        for key in keys:
            if (account := self._quotas.opened(key.name)) is not None:
                account.change_key(key)
        logger.info("API keys have changed: there are %d now, revoked: %s; %d open requests end",
                    len(keys), ", ".join(key.name for key in revoked) or "none", num_ended)  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """State, for `Router.snapshot`."""
        error = self._file.error if self._file is not None else None
        return {
            "num_keys": sum(not key.is_expired(self.clock()) for key in self.keys),
            "num_key_changes": self._num_changes,
            "is_key_file_wrong": error is not None,
            "key_file_error": error,
            "is_accountant_away": self._quotas.is_away,
            "is_usage_record_away": self.meter.budgets.is_away,
        }

    def close(self) -> None:
        """Stop following the file and talking to the accountant."""
        self._quotas.close()
        self.meter.close()
        self.stop_following()

    def stop_following(self) -> None:
        """Stop following the file, and looking for usage that other routers have left; what is known stays."""
        if self._following is not None:
            self._following.cancel()
        self.meter.stop_looking()

    def _set_keys(self, keys: tuple[ApiKey, ...]) -> None:
        self.keys = keys
        self._by_name = {key.name: key for key in keys}
        self._by_digest = {key.digest: key for key in keys}

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            try:
                keys = await asyncio.to_thread(self._file.look) if self._file is not None else None
                if keys is not None:
                    self.change_keys(keys)
            except Exception:
                logger.exception("changes of the API keys cannot be read; the keys stay as they are")
            self._end_expired()

    def _end(self, key: ApiKey, *, is_gone: bool, why: str) -> int:
        """See `Account.revoke`."""
        account = self._quotas.opened(key.name)
        return account.revoke(is_gone=is_gone, why=why) if account is not None else 0

    def _end_expired(self) -> None:
        """End what runs with keys that have expired."""
        now = self.clock()
        for key in self.keys:
            if key.is_expired(now) and (num_ended := self._end(key, is_gone=True, why=EXPIRED)):
                logger.info("API key %s has expired; %d open requests end", key.name, num_ended)
