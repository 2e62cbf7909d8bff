"""Messages between routers and the catalog of adapters, as msgpack."""

from enum import StrEnum

import msgspec


class Source(StrEnum):
    """Where an adapter's name comes from."""

    CONFIGURED = "configured"
    """The configuration's list."""
    FOLDER = "folder"
    """A subdirectory of the watched folder."""
    REQUESTED = "requested"
    """An administrator's request."""


class KnownAdapter(msgspec.Struct, frozen=True, array_like=True):
    """An adapter that requests may name.

    Attributes:
        name: what requests give as their `model`.
        key: key of the entry of `models` whose engines it is for.
        path: its directory.
        digest: `adapter_digest` of its files.
        created: when its weights were written, in seconds since 1970.
        source: where its name comes from.
        origin: where machines without `path` get its files, as in `AdapterRef`.
    """

    name: str
    key: str
    path: str
    digest: str
    created: int
    source: Source
    origin: str | None = None


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """What an administrator asked for last under one name. Of two wishes for a name, the one with the larger number
    holds.

    Attributes:
        name: the adapter's name.
        number: microseconds since 1970 when the catalog granted it, and larger than that of any earlier wish.
        adapters: what is loaded, one for each entry of the model; empty once it is unloaded.
    """

    name: str
    number: int
    adapters: list[KnownAdapter] = []


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """A router's side of an exchange, which it begins.

    Attributes:
        incarnation: incarnation of the catalog that the router knows; "" for none yet.
        revision: the last revision that the router has heard of it; -1 for none.
        wishes: the administrators' wishes that the router knows, for a catalog that has just started.
    """

    incarnation: str = ""
    revision: int = -1
    wishes: list[Wish] = []


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """The catalog's side of an exchange.

    Attributes:
        incarnation: another one after each start of the catalog, which then knows of no wish.
        revision: counts its changes.
        is_settled: it has read everything that it found when it started, and had time to hear of earlier wishes.
        adapters: all adapters; several have the same name where several entries of one model take it. None if the
            router has heard of this revision.
        wishes: all wishes; None likewise.
        faults: what is wrong with directories that hold no adapter that can be served, by name.
    """

    incarnation: str
    revision: int
    is_settled: bool
    adapters: list[KnownAdapter] | None = None
    wishes: list[Wish] | None = None
    faults: dict[str, str] = {}


class LoadOrder(msgspec.Struct, frozen=True, array_like=True):
    """An administrator's order to load an adapter.

    Attributes:
        name: the name that requests will give.
        path: its directory.
        model: name of the model that it belongs to; None for the only one that takes adapters.
        replaces: whether it may take the place of an adapter of this name.
    """

    name: str
    path: str
    model: str | None = None
    replaces: bool = False


class OrderRefusal(msgspec.Struct, frozen=True, array_like=True):
    """Why an order is not carried out.

    Attributes:
        message: the reason and what to do, for people.
        param: the field at fault; None for none.
        is_unknown: there is no adapter of this name.
        is_early: the catalog has just started; the same order may succeed in a few seconds.
    """

    message: str
    param: str | None = None
    is_unknown: bool = False
    is_early: bool = False


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of an order.

    Attributes:
        refusal: why it was not carried out; None if it was.
        wish: what holds for the name from now on, if it was.
    """

    refusal: OrderRefusal | None = None
    wish: Wish | None = None


encode = msgspec.msgpack.Encoder().encode
"""Encodes any of these messages."""
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_order = msgspec.msgpack.Decoder(LoadOrder).decode
decode_outcome = msgspec.msgpack.Decoder(Outcome).decode
