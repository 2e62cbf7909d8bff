"""Calls to replicas that are sent together, because each asks for less work than a call costs."""

import asyncio
from collections.abc import Sequence

from deployments.channel.messages import GenerateCall, GenerateReply, decode_replies, encode
from deployments.fleet.engine_client import EngineClient

_MOST_CALLS = 64
_MOST_TOKENS = 16_384


class _Batch:
    """Calls that go to one replica in one message. All end together, when the last one has ended."""

    def __init__(self, client: EngineClient, ranking: Sequence[str]) -> None:
        self._is_sent = False
        self._client = client
        self._ranking = ranking
        self._calls: list[GenerateCall] = []
        self._replies: list[asyncio.Future[GenerateReply]] = []
        self._num_tokens = 0
        loop = asyncio.get_running_loop()
        # One turn of the event loop later, the calls released together with the first have joined.
        self._task: asyncio.Task[list[GenerateReply]] = loop.create_task(self._send())
        self._task.add_done_callback(self._on_sent)

    def add(self, call: GenerateCall, num_tokens: int) -> "asyncio.Future[GenerateReply]":
        """Add a call to the batch. Cancel what this returns to give it up."""
        reply: asyncio.Future[GenerateReply] = asyncio.get_running_loop().create_future()
        reply.add_done_callback(self._on_done)
        self._calls.append(call)
        self._replies.append(reply)
        self._num_tokens += num_tokens
        return reply

    def has_room(self, num_tokens: int) -> bool:
        """Whether another call may join."""
        return not self._is_sent and len(self._calls) < _MOST_CALLS and self._num_tokens + num_tokens <= _MOST_TOKENS

    async def _send(self) -> list[GenerateReply]:
        self._is_sent = True
        calls = encode(self._calls)
        self._calls.clear()
        return decode_replies(await self._client.generate_batch(calls, self._ranking))

    def _on_sent(self, task: "asyncio.Task[list[GenerateReply]]") -> None:
        """Hand out the replies, or what went wrong. If the task was cancelled, all calls had been given up."""
        error = None if task.cancelled() else task.exception()
        for index, future in enumerate(self._replies):
            if future.done():
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result()[index])

    def _on_done(self, reply: "asyncio.Future[GenerateReply]") -> None:
        if reply.cancelled() and all(other.cancelled() for other in self._replies):
            self._task.cancel()


class CallBatches:
    """Sends calls of one HTTP request that go to the same replica at the same time as one message.

    A call through Ray Serve takes milliseconds; computing the vector of a short text takes far less.

    Each call fails, is refused and is given up by itself. If one is given up while others continue, the work begun for
    it is wasted.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Batch] = {}

    async def generate(
        self, client: EngineClient, call: GenerateCall, ranking: Sequence[str], num_tokens: int
    ) -> GenerateReply:
        """Run a call on a replica, as `EngineClient.generate` does.

        Args:
            client: takes the messages.
            call: what to run.
            ranking: ids of replicas, best first.
            num_tokens: tokens of the call's prompt.

        Raises:
            ReplicaLostError: the replica is gone.
        """
        batch = self._open.get(ranking[0])
        if batch is None or not batch.has_room(num_tokens):
            batch = self._open[ranking[0]] = _Batch(client, ranking)
        return await batch.add(call, num_tokens)
