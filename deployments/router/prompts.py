"""The prompts of one HTTP request's generations, many of which may be the same.

Equal prompts are recognized by identity: hashing and comparing long ones again and again would hold up the event loop,
and equal prompts of one HTTP request are one object.
"""

from collections.abc import Sequence

from deployments.channel.messages import block_hash
from llm.scheduling.prefix_cache import PageHashes
from llm.serving.schemas import GenerationRequest


def num_prompt_tokens(requests: Sequence[GenerationRequest]) -> int:
    """Number of prompt tokens of an HTTP request, as its answer counts them: a prompt that several continue counts
    once."""
    pooled = [len(request.prompt_token_ids or ()) for request in requests if request.gives_vector]
    continued = {id(r.prompt_token_ids): len(r.prompt_token_ids or ()) for r in requests if not r.gives_vector}
    return sum(pooled) + sum(continued.values())


def prompt_hashes(requests: Sequence[GenerationRequest], page_size: int) -> dict[int, list[int]]:
    """The hashes by which replicas' reports name the full pages of each prompt, by the prompt's `id`."""
    found: dict[int, list[int]] = {}
    for request in requests:
        prompt = request.prompt_token_ids or ()
        if id(prompt) not in found:
            hashes = PageHashes(page_size, request.cache_salt.encode())
            found[id(prompt)] = [block_hash(name) for name in hashes.extend(prompt, len(prompt))]
    return found


def leaders(requests: Sequence[GenerationRequest], min_tokens: int) -> dict[int, int]:
    """Maps each request whose prompt an earlier request has too, if it is worth sharing, to the earlier one's index."""
    firsts: dict[tuple[int, ...], int] = {}
    same: dict[int, int] = {}
    found: dict[int, int] = {}
    for index, request in enumerate(requests):
        prompt = request.prompt_token_ids or ()
        if len(requests) == 1 or len(prompt) < min_tokens:
            continue
        first = same.get(id(prompt))
        if first is None:
            first = same[id(prompt)] = firsts.setdefault(prompt, index)
        if first != index:
            found[index] = first
    return found
