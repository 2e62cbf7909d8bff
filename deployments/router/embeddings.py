"""Embeddings: each input goes to a replica of its own choice, and elsewhere if that is lost."""

import asyncio
from collections.abc import Sequence

from deployments.channel.messages import EmbedCall, decode_embed_reply, encode
from deployments.errors import ReplicaLostError
from deployments.fleet.engine_client import EngineClient
from deployments.fleet.fleet import Fleet
from llm.errors import EngineError, InvalidRequestError

_AT_ONCE = 16
_RETRY_DELAY_S = 0.05


async def embed_all(
    client: EngineClient, fleet: Fleet, inputs: Sequence[list[int]], pooling: str, *, max_retries: int
) -> list[list[float]]:
    """The vector of each input, in order.

    Args:
        max_retries: how often an input may go elsewhere after its replica was lost.

    Raises:
        InvalidRequestError: an input cannot be embedded.
        EngineError: the engines failed.
    """
    gate = asyncio.Semaphore(_AT_ONCE)

    async def embed(token_ids: list[int]) -> list[float]:
        async with gate:
            return await _embed(client, fleet, EmbedCall(token_ids, pooling), max_retries)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(embed(token_ids)) for token_ids in inputs]
    return [task.result() for task in tasks]


async def _embed(client: EngineClient, fleet: Fleet, call: EmbedCall, max_retries: int) -> list[float]:
    failure = ""
    for attempt in range(max_retries + 1):
        try:
            ranking = fleet.rank(len(call.token_ids), ())
            reply = decode_embed_reply(await client.embed(encode(call), ranking))
        except ReplicaLostError as error:
            failure = str(error)
            await asyncio.sleep(_RETRY_DELAY_S * (attempt + 1))
            continue
        if reply.refusal is not None:
            raise InvalidRequestError(reply.refusal.message, param="input", code=reply.refusal.code)
        if reply.vector is not None:
            return reply.vector
        failure = reply.failure or ""
    raise EngineError(f"the embedding failed: {failure}")
