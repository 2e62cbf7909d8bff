"""Messages between routers and the accountant of API keys' limits."""

import msgspec


class Quota(msgspec.Struct, frozen=True, array_like=True):
    """A key's limits; None for no limit."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    max_concurrent_requests: int | None = None


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """How much of one of a key's rates a router holds, in requests or tokens.

    Attributes:
        in_hand: units leased and not spent; below zero if units were spent without a lease.
        num_spent: units spent since the router started.
        num_spare: units that the router would like to have in hand for future requests.
        level: what the shared bucket holds as far as the router knows, for an accountant that has just started.
    """

    in_hand: int = 0
    num_spent: int = 0
    num_spare: int = 0
    level: float | None = None


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """What a router holds and needs for one key.

    Attributes:
        key: name of the key.
        quota: the key's limits.
        num_waiting: requests that wait for this exchange.
        num_open: requests that run.
        num_permits: permits that the router holds, at least `num_open`.
        num_spare_permits: permits that it would like to hold for future requests.
        requests: what it holds of `quota.requests_per_min`.
        tokens: what it holds of `quota.tokens_per_min`.
    """

    key: str
    quota: Quota
    num_waiting: int = 0
    num_open: int = 0
    num_permits: int = 0
    num_spare_permits: int = 0
    requests: Holding = Holding()
    tokens: Holding = Holding()


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """A router's side of one exchange, which it begins.

    Attributes:
        router_id: id of the router, for as long as it lives.
        number: how many exchanges the router has begun; one that arrives after a later one is dropped.
        incarnation: incarnation of the accountant that the router knows; "" for none yet.
        claims: one for each key of which the router holds or needs something.
    """

    router_id: str
    number: int
    incarnation: str
    claims: list[Claim]


class Lease(msgspec.Struct, frozen=True, array_like=True):
    """What is added to a router's holding of a rate.

    Attributes:
        num_units: units to be added to those in hand.
        level: what the shared bucket holds after that.
        remaining: `level` plus what this router has in hand and what others have idle.
    """

    num_units: int = 0
    level: float = 0.0
    remaining: float = 0.0


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a claim.

    Attributes:
        key: name of the key.
        num_permits: permits to be added to those that the router holds.
        most_idle_permits: most idle permits that the router may hold from now on.
        requests, tokens: the leases; None for a rate that is not limited.
    """

    key: str
    num_permits: int = 0
    most_idle_permits: int = 0
    requests: Lease | None = None
    tokens: Lease | None = None


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The answer to an exchange.

    Attributes:
        incarnation: incarnation of this accountant. If it is new to the router, the router states everything again.
        is_recovering: nothing is granted yet; ask again soon.
        grants: one for each claim, unless the accountant is new to the router or is recovering.
    """

    incarnation: str
    is_recovering: bool = False
    grants: list[Grant] = []
