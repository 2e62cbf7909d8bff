"""A router's journal of live requests: what each one asked for, what it has got, and how it goes on elsewhere."""

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Sequence

from deployments.engine_client import EngineClient, ReplicaLostError
from deployments.wire import ChannelAddress, End, GenerateCall, GenerateReply, TokenItem, decode_reply, encode
from llm.errors import EngineError, InvalidRequestError, LLMError
from llm.serving.schemas import FinishReason, GenerationRequest, TokenLogprobs

logger = logging.getLogger("ray.serve")

_RESUME_DELAY_S = 0.05


class Generation:
    """One request on its way through the engines. Lives on the router's event loop.

    Tokens come from the token channel as they are made, and once more, in full, with the reply to the call. If the
    replica dies, the request goes on in another one behind the tokens that have come so far.

    Attributes:
        index: its place in the group.
        token_ids: all tokens so far.
        logprobs: one entry for each of `token_ids` where the request asks for them.
        end: how it ended, None while it runs.
        error: what went wrong, with no further tokens to come. `end` stays None.
    """

    def __init__(self, group: "GenerationGroup", index: int, request: GenerationRequest) -> None:
        self.index = index
        self.request = request
        self.token_ids: list[int] = list(request.output_token_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.end: End | None = None
        self.error: LLMError | None = None
        self.num_resumes = 0
        self._group = group
        self._is_announced = False
        self._task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None or self.error is not None

    def start(self, journal: "Journal") -> None:
        """Send it to a replica."""
        # Outside the HTTP request's context: Ray Serve would tie the calls to it and cancel them itself when the client
        # leaves, which looks like a lost replica.
        context = contextvars.Context()
        self._task = asyncio.get_running_loop().create_task(self._drive(journal), context=context)

    def cancel(self) -> None:
        """Give it up; the engine drops it within a step. No effect on one that is over."""
        if self._task is not None and self.end is None:
            self._task.cancel()

    def take_item(self, item: TokenItem) -> None:
        """Add what the token channel brought. After a gap only the reply can fill, later items are left out."""
        known = len(self.token_ids)
        skip = known - item.offset
        if skip < 0 or self.is_over:
            return
        if skip < len(item.token_ids):
            self.token_ids.extend(item.token_ids[skip:] if skip else item.token_ids)
            if item.logprobs is not None:
                self.logprobs.extend(item.logprobs[skip:])
        elif item.end is None:
            return
        self.end = item.end
        self.announce()

    def announce(self) -> None:
        """Tell the group that there is news, once until the news is collected."""
        if not self._is_announced:
            self._is_announced = True
            self._group.wake_up(self)

    def mark_collected(self) -> None:
        """The group's reader has this generation in hand; later news is announced again."""
        self._is_announced = False

    async def _drive(self, journal: "Journal") -> None:
        """Call replicas until the request is over."""
        try:
            while not self.is_over:
                await self._attempt(journal)
        except LLMError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("request %s failed", self.request.request_id)
            self._fail(EngineError(f"the request failed ({type(error).__name__})"))

    async def _attempt(self, journal: "Journal") -> None:
        """One call to one replica. Returns with the request over, or ready to go on elsewhere."""
        stream_id = journal.register(self)
        try:
            call = GenerateCall.of(self._remaining_request(), stream_id, journal.channel)
            reply = decode_reply(await journal.client.generate(encode(call)))
        except ReplicaLostError as error:
            failure = str(error)
        else:
            if reply.refusal is not None:
                raise InvalidRequestError(reply.refusal.message, param=reply.refusal.param, code=reply.refusal.code)
            self._absorb(reply)
            if reply.failure is None:
                return
            failure = reply.failure
        finally:
            journal.unregister(stream_id)
        if not self.is_over:
            await self._prepare_resume(journal, failure)

    async def _prepare_resume(self, journal: "Journal", failure: str) -> None:
        """Get ready to go on elsewhere.

        Raises:
            EngineError: it has gone on too often already.
        """
        if len(self.token_ids) >= self.request.max_new_tokens:  # only the news of the end was lost
            self.end = End(FinishReason.LENGTH)
            self.announce()
            return
        if self.num_resumes >= journal.max_resumes:
            raise EngineError("the engine replica was lost and the request could not be resumed")
        self.num_resumes += 1
        journal.num_resumes += 1
        logger.warning(
            "request %s goes on elsewhere behind %d tokens: %s",
            self.request.request_id, len(self.token_ids), failure,
        )  # fmt: skip
        await asyncio.sleep(_RESUME_DELAY_S * self.num_resumes)

    def _remaining_request(self) -> GenerationRequest:
        if not self.num_resumes:
            return self.request
        # A new id: the engine that is thought lost may still run the old one.
        request_id = f"{self.request.request_id}-{self.num_resumes}"
        return self.request.model_copy(update={"request_id": request_id, "output_token_ids": tuple(self.token_ids)})

    def _absorb(self, reply: GenerateReply) -> None:
        """Add what the channel did not bring."""
        missing = len(reply.token_ids) - len(self.token_ids)
        if missing > 0:
            self.token_ids.extend(reply.token_ids[-missing:])
            if reply.logprobs is not None:
                self.logprobs.extend(reply.logprobs[-missing:])
        if self.end is None and (missing > 0 or reply.end is not None):
            self.end = reply.end
            self.announce()

    def _fail(self, error: LLMError) -> None:
        if not self.is_over:
            self.error = error
            self.announce()


class GenerationGroup:
    """The generations of one HTTP request, with one waiter for all: one wake-up a step, however many there are."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self.generations = [Generation(self, i, request) for i, request in enumerate(requests)]
        self._news: list[Generation] = []
        self._waiter: asyncio.Future[None] | None = None

    async def news(self) -> list[Generation]:
        """Wait until generations have got on; return these. One caller at a time."""
        while not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news = self._news, []
        for generation in news:
            generation.mark_collected()
        return news

    def wake_up(self, generation: Generation) -> None:
        """A generation has got on."""
        self._news.append(generation)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Give up what still runs. Safe to call at any time, more than once."""
        for generation in self.generations:
            generation.cancel()


class Journal:
    """Every live generation of a router, by the number its tokens come under.

    Args:
        client: the engine replicas.
        channel: where tokens come in; None to live on replies alone.
        max_resumes: how often a request may go on elsewhere.
    """

    def __init__(self, client: EngineClient, channel: ChannelAddress | None, *, max_resumes: int) -> None:
        self.client = client
        self.channel = channel
        self.max_resumes = max_resumes
        self.num_resumes = 0
        self.num_requests = 0
        self._live: dict[int, Generation] = {}
        self._stream_ids = itertools.count(1)

    @property
    def num_live(self) -> int:
        """Generations that a replica runs."""
        return len(self._live)

    def start(self, requests: Sequence[GenerationRequest]) -> GenerationGroup:
        """Begin an HTTP request's generations."""
        group = GenerationGroup(requests)
        self.num_requests += len(requests)
        for generation in group.generations:
            generation.start(self)
        return group

    def register(self, generation: Generation) -> int:
        """A number for an attempt's tokens."""
        stream_id = next(self._stream_ids)
        self._live[stream_id] = generation
        return stream_id

    def unregister(self, stream_id: int) -> None:
        """The attempt is over; what still comes under its number is dropped."""
        del self._live[stream_id]

    def take_items(self, items: list[TokenItem]) -> None:
        """Hand tokens from the channel to their generations."""
        live = self._live
        for item in items:
            generation = live.get(item.stream_id)
            if generation is not None:
                generation.take_item(item)
