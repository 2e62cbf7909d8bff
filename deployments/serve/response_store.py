"""The responses that several routers share: a deployment with one replica, and the client through which routers call
it."""

from collections.abc import Sequence
from typing import Any

import msgspec

from deployments.api.openai.response_store import ResponseDatabase, StoredResponse
from deployments.api_config import ResponsesConfig
from deployments.errors import StoreAwayError
from deployments.serve.calls import call

_TIMEOUT_S = 5.0
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(StoredResponse)


class ResponseStoreReplica:
    """A `ResponseDatabase` behind Ray Serve. Responses kept in memory are lost when it ends.

    Args:
        config: the database's bounds, and its file if it has one.
    """

    def __init__(self, config: ResponsesConfig) -> None:
        self._database = ResponseDatabase(config.path, config.max_responses, config.max_bytes)

    def put(self, owner: str, response: bytes) -> bool:
        """See `ResponseStore.put`; the response is encoded."""
        return self._database.put(owner, _decoder.decode(response))

    def get(self, owner: str, response_id: str) -> bytes | None:
        """See `ResponseStore.get`; the response is encoded."""
        found = self._database.get(owner, response_id)
        return _encode(found) if found is not None else None

    def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore.delete`."""
        return self._database.delete(owner, response_id)

    def find_items(self, owner: str, item_ids: list[str]) -> dict[str, bytes]:
        """See `ResponseStore.find_items`."""
        return self._database.find_items(owner, item_ids)


class ServeResponseStore:
    """`ResponseStore` through a Ray Serve deployment handle.

    Args:
        handle: of the `ResponseStore` deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def put(self, owner: str, response: StoredResponse) -> bool:
        """See `ResponseStore`."""
        return bool(await _result(self._handle.put, owner, _encode(response)))

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """See `ResponseStore`."""
        found = await _result(self._handle.get, owner, response_id)
        return _decoder.decode(found) if found is not None else None

    async def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore`."""
        return bool(await _result(self._handle.delete, owner, response_id))

    async def find_items(self, owner: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See `ResponseStore`."""
        found: dict[str, bytes] = await _result(self._handle.find_items, owner, list(item_ids))
        return found


async def _result(method: Any, *arguments: Any) -> Any:
    return await call(method, *arguments, away=StoreAwayError, timeout_s=_TIMEOUT_S)
