"""Continued conversations of the Responses API: what a request refers to, and what is kept of its response."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import TypeAdapter

from deployments.api.openai.response_items import InputItem, ItemReference, stored_item
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.api.openai.response_store import ResponseStore, StoredItem, StoredResponse
from deployments.api.sse import encode_json
from deployments.chat.errors import APIError, invalid
from deployments.chat.threads import INLINE_BYTES
from deployments.errors import StoreAwayError

logger = logging.getLogger("ray.serve")

MAX_PAGE_ITEMS = 100
_as_item = TypeAdapter(InputItem).validate_python


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request asks to be answered.

    Attributes:
        body: the request, with the whole conversation as its `input`.
        earlier: what was said before the request, as stored.
        new: items that the request adds.
    """

    body: ResponsesRequest
    earlier: tuple[StoredItem, ...]
    new: list[Any]


class Conversations:
    """Assembles conversations from what is stored, and stores their continuations.

    Args:
        store: where responses are kept; None for nowhere.
    """

    def __init__(self, store: ResponseStore | None) -> None:
        self._store = store

    def is_kept(self, body: ResponsesRequest) -> bool:
        """Whether the response to this request is going to be stored."""
        return self._store is not None and body.store is not False

    async def whole(self, owner: str, body: ResponsesRequest) -> Conversation:
        """The conversation that a request continues or begins.

        Raises:
            APIError: a 400; what the request refers to is not stored.
            StoreAwayError: the store cannot be reached.
        """
        references = [item.id for item in body.items() if isinstance(item, ItemReference)]
        earlier = await self._earlier(owner, body.previous_response_id)
        referred = await self._referred(owner, references)
        new = [referred[item.id] if isinstance(item, ItemReference) else item for item in body.items()]
        if not earlier and not referred:
            return Conversation(body, (), new)
        items = [*await _items([item.data for item in earlier]), *new]
        return Conversation(body.model_copy(update={"input": items}), earlier, new)

    async def keep(self, owner: str, conversation: Conversation, response: dict[str, Any]) -> None:
        """Store a response; if that is not possible, it is still sent to the client.

        Args:
            owner: whose response it is.
            conversation: the conversation that it answers.
            response: the response as sent.
        """
        assert self._store is not None, "asked before"
        try:
            if not await self._store.put(owner, await asyncio.to_thread(_stored, conversation, response)):
                logger.warning("%s is not stored: it is larger than responses.max_bytes", response["id"])
        except StoreAwayError as error:
            logger.warning("%s is not stored: %s", response["id"], error)

    async def read(self, owner: str, response_id: str) -> bytes:
        """A stored response, in JSON.

        Raises:
            APIError: a 404; it is not stored.
            StoreAwayError: the store cannot be reached.
        """
        stored = await self._find(owner, response_id)
        return stored.head[:-1] + b',"output":' + _list_of(stored.output) + b"}"

    async def delete(self, owner: str, response_id: str) -> dict[str, Any]:
        """Delete a response.

        Raises:
            APIError: a 404; it is not stored.
            StoreAwayError: the store cannot be reached.
        """
        if self._store is None or not await self._store.delete(owner, response_id):
            raise _unknown_response(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def input_items(
        self, owner: str, response_id: str, *, limit: int, is_ascending: bool, after: str | None
    ) -> bytes:
        """A page of the input of a stored response, in JSON, from the conversation's beginning or from its end.

        Raises:
            APIError: a 404 if the response is not stored; a 400 if no item has the id `after`.
            StoreAwayError: the store cannot be reached.
        """
        stored = await self._find(owner, response_id)
        items = list(stored.input if is_ascending else reversed(stored.input))
        if after is not None:
            places = [place for place, item in enumerate(items) if item.id == after]
            if not places:
                raise invalid(f"after: the response has no item with id {after[:80]!r}", "after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        head = {
            "object": "list",
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(items) > limit,
        }
        return encode_json(head)[:-1] + b',"data":' + _list_of(page) + b"}"

    async def _find(self, owner: str, response_id: str) -> StoredResponse:
        stored = await self._store.get(owner, response_id) if self._store is not None else None
        if stored is None:
            raise _unknown_response(response_id)
        return stored

    async def _earlier(self, owner: str, response_id: str | None) -> tuple[StoredItem, ...]:
        """Items of the conversation that is continued."""
        if response_id is None:
            return ()
        stored = await self._store.get(owner, response_id) if self._store is not None else None
        if stored is None:
            message = f"Previous response with id {response_id[:80]!r} not found"
            raise invalid(message, "previous_response_id", "previous_response_not_found")
        return stored.input + stored.output

    async def _referred(self, owner: str, item_ids: Sequence[str]) -> dict[str, Any]:
        """The items with these ids."""
        found = await self._store.find_items(owner, item_ids) if self._store is not None and item_ids else {}
        for item_id in item_ids:
            if item_id not in found:
                raise invalid(f"input: Item with id {item_id[:80]!r} not found", "input", "item_not_found")
        return dict(zip(found, await _items(list(found.values())), strict=True))


async def _items(stored: Sequence[bytes]) -> list[Any]:
    """Stored items, validated as in a request; one after another, and in a thread if they are long."""

    def understood() -> list[Any]:
        return [_as_item(msgspec.json.decode(data)) for data in stored]

    return understood() if sum(map(len, stored)) <= INLINE_BYTES else await asyncio.to_thread(understood)


def _list_of(items: Sequence[StoredItem]) -> bytes:
    return b"[" + b",".join(item.data for item in items) + b"]"


def _stored(conversation: Conversation, response: dict[str, Any]) -> StoredResponse:
    head = {name: value for name, value in response.items() if name != "output"}
    return StoredResponse(
        id=response["id"],
        head=encode_json(head),
        input=(*conversation.earlier, *(_encoded(stored_item(item)) for item in conversation.new)),
        output=tuple(_encoded(item) for item in response["output"]),
    )


def _encoded(item: dict[str, Any]) -> StoredItem:
    return StoredItem(item["id"], encode_json(item))


def _unknown_response(response_id: str) -> APIError:
    message = f"Response with id {response_id[:80]!r} not found"
    return APIError(404, message, param="response_id", code="response_not_found")
