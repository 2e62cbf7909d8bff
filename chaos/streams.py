"""Clients that keep many streams open and write down what became of each."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp


@dataclass(slots=True)
class Story:
    """What one client saw."""

    prompt: str
    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    """Code of the error, or what the connection died of."""
    retry_after: str | None = None
    started_at: float = field(default_factory=time.monotonic)
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came."""
    num_comments: int = 0
    """Comments (`: …`) that kept the stream alive while there was nothing to say."""
    ended_at: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer came."""
        return self.finish_reason is not None and self.error is None

    @property
    def longest_pause_s(self) -> float:
        """Longest time between two pieces of text."""
        return max((b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)), default=0.0)


class Clients:
    """Asks one server. Use as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None, "entered"
        await self._session.close()

    async def get(self, path: str) -> Any:
        """JSON of a GET."""
        assert self._session is not None, "entered"
        async with self._session.get(self._url + path) as response:
            return await response.json()

    async def time_gets(self, path: str, is_over: asyncio.Event) -> list[float]:
        """Seconds that each of ten GETs a second takes, meanwhile."""
        seconds = []
        while not is_over.is_set():
            start = time.monotonic()
            await self.get(path)
            seconds.append(time.monotonic() - start)
            await asyncio.sleep(0.1)
        return seconds

    async def embed(self, inputs: list[list[int]]) -> tuple[int, list[list[float]]]:
        """HTTP status and vectors of some inputs; no vectors where the status is not 200."""
        assert self._session is not None, "entered"
        body = {"model": "demo", "input": inputs}
        async with self._session.post(self._url + "/v1/embeddings", json=body) as response:
            answer = await response.json()
            return response.status, [entry["embedding"] for entry in answer.get("data", [])]

    async def ask(self, prompt: str, max_tokens: int, *, chat: bool = False, most_pieces: int | None = None) -> Story:
        """Read one stream to its end, or leave after `most_pieces` pieces of text."""
        assert self._session is not None, "entered"
        story = Story(prompt)
        body: dict[str, Any] = {"model": "demo", "max_tokens": max_tokens, "stream": True, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        try:
            async with self._session.post(self._url + path, json=body) as response:
                story.status = response.status
                story.retry_after = response.headers.get("Retry-After")
                if response.status != 200:
                    story.error = _code(await response.text())
                    return story
                async for line in response.content:
                    if not self._take(story, line) or len(story.arrivals) == most_pieces:
                        break
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            story.error = type(error).__name__
        finally:
            story.ended_at = time.monotonic()
        if story.error is None and story.finish_reason is None and most_pieces is None:
            story.error = "cut"
        return story

    async def keep_asking(
        self, prompts: list[str], max_tokens: int, num_clients: int, is_over: Callable[[], bool], *, chat: bool = False
    ) -> list[Story]:
        """`num_clients` clients, each with one stream after the other until it is over; the last are read whole."""
        stories: list[Story] = []

        async def client(index: int) -> None:
            while not is_over():
                index += 1
                stories.append(await self.ask(prompts[index % len(prompts)], max_tokens, chat=chat))
                if stories[-1].error is not None:
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(client(i) for i in range(num_clients)))
        return stories

    async def arrive(self, rate: float, seconds: float, prompts: list[str], max_tokens: int, seed: int) -> list[Story]:
        """Requests at random times (Poisson), whether or not earlier ones have been answered."""
        draws = random.Random(seed)
        start = time.monotonic()
        at, asking = 0.0, []
        while at < seconds:
            at += draws.expovariate(rate)
            await asyncio.sleep(max(0.0, start + at - time.monotonic()))
            asking.append(asyncio.create_task(self.ask(draws.choice(prompts), max_tokens)))
        return list(await asyncio.gather(*asking))

    @staticmethod
    def _take(story: Story, line: bytes) -> bool:
        """Take a line of the stream; False at its end."""
        if not line.startswith(b"data: "):
            story.num_comments += line.startswith(b":")
            return True
        if line.strip() == b"data: [DONE]":
            return False
        event = json.loads(line[6:])
        if "error" in event:
            story.error = event["error"]["code"] or event["error"]["type"]
            return True
        for choice in event["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if text:
                story.text += text
                story.arrivals.append(time.monotonic())
            story.finish_reason = choice["finish_reason"] or story.finish_reason
        return True


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie; 0 for none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def _code(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"not an OpenAI error: {body[:80]!r}"
