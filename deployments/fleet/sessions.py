"""Which replica served each session last."""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

MAX_SESSIONS = 65_536
"""Sessions that a router remembers, some 10 MB; those without a request for the longest time are forgotten first."""
_DIGEST_BYTES = 16


def session_key(tenant: str, session_id: str) -> bytes:
    """A short name for one tenant's session; empty if there is no session."""
    if not session_id:
        return b""
    name = tenant.encode()
    return blake2b(len(name).to_bytes(4, "big") + name + session_id.encode(), digest_size=_DIGEST_BYTES).digest()


class SessionHomes:
    """Where one router's sessions belong. `Fleet` tells it what was sent where.

    A session's home is the replica that served it last. A session that this router does not know has one all the same,
    and every router finds the same one: the replica that comes first in the order which the session's own hash gives
    them (Thaler and Ravishankar 1998). So a conversation whose requests reach several routers stays on one replica.
    """

    def __init__(self) -> None:
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def home(self, session: bytes, replica_ids: Iterable[str]) -> str | None:
        """Id of the session's replica; None for requests without a session, and if there is no replica.

        Args:
            session: what `session_key` returned.
            replica_ids: the replicas to choose from.
        """
        if not session:
            return None
        known = self._homes.get(session)
        if known is not None:
            return known
        return max(replica_ids, key=lambda replica_id: blake2b(replica_id.encode(), key=session).digest(), default=None)

    def note(self, session: bytes, replica_id: str) -> None:
        """Note that a replica serves the session. No effect for requests without a session."""
        if not session:
            return
        self._homes[session] = replica_id
        self._homes.move_to_end(session)
        if len(self._homes) > MAX_SESSIONS:
            self._homes.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """Forget a replica that is gone; its sessions get another home."""
        for session in [session for session, home in self._homes.items() if home == replica_id]:
            del self._homes[session]
