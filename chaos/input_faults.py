"""Bad inputs that take a server the longest to refuse, and how long that takes."""

import time
from typing import Any

import aiohttp

from chaos.fleet import Outcome, Place, emulated, running
from chaos.streams import percentile

_MOST_S = 1.0
_CHAT, _COMPLETIONS, _EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def _nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _chat(content: str = "hi", **changes: Any) -> tuple[str, dict[str, Any]]:
    return _CHAT, {"model": "demo", "messages": [{"role": "user", "content": content}], **changes}


def _bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": _nested(150)}}
    return {
        "a word of 7 MB": _chat("a" * (7 << 20)),
        "a body of 10 MB": _chat("a" * (10 << 20)),
        "a stop string of 1 MB": _chat(stop="a" * (1 << 20)),
        "a schema of 150 levels": _chat(response_format=schema),
        "a bad regular expression": _chat(guided_regex="(" * 5000),
        "10,000 prompts": (_COMPLETIONS, {"model": "demo", "prompt": ["a"] * 10_000}),
        "120,000 token ids": (_COMPLETIONS, {"model": "demo", "prompt": [97] * 120_000, "n": 128}),
        "5,000 inputs to embed": (_EMBEDDINGS, {"model": "demo", "input": ["a"] * 5000}),
        "5,000 documents to rank": ("/v1/rerank", {"model": "demo", "query": "a", "documents": ["a"] * 5000}),
    }


async def bad_inputs(place: Place, num_rounds: int = 5) -> Outcome:
    """Each of the bad inputs that are dearest to refuse, on an idle server: answered within a second."""
    waits: dict[str, list[float]] = {}
    statuses = set()
    async with (
        running(place, "inputs", emulated(1)) as (fleet, clients),
        aiohttp.ClientSession() as session,
    ):
        for _ in range(num_rounds):
            for name, (path, body) in _bad_inputs().items():
                started = time.monotonic()
                async with session.post(fleet.url + path, json=body) as response:
                    await response.read()
                    statuses.add(response.status)
                waits.setdefault(name, []).append(time.monotonic() - started)
        answered = (await clients.ask("still there?", 20)).is_complete
        await fleet.wait_until_idle(clients)
    slowest = max(waits, key=lambda name: max(waits[name]))
    every = [wait for each in waits.values() for wait in each]
    figure = (
        f"{len(every)} bad inputs of {len(waits)} kinds refused with HTTP {sorted(statuses)}, p50 "
        f"{percentile(every, 0.5):.2f} s, at most {max(every):.2f} s ({slowest})"
    )
    return Outcome(figure, statuses <= {400, 413}, max(every) < _MOST_S, answered)
