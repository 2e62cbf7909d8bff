"""The prompts of one HTTP request's generations, many of which may be the same.

Equal prompts are recognized by identity: hashing and comparing long ones again and again would hold up the event loop,
and equal prompts of one HTTP request are one object.
"""

from collections.abc import Sequence

from deployments.channel.messages import block_hash
from llm.scheduling.prefix_cache import PageHashes
from llm.serving.schemas import GenerationRequest, Pooling

_WORTH_A_WAIT = 4096
"""Tokens whose computation takes an engine about as long as a call and a step."""


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
            hashes = PageHashes(page_size, request.page_salt)
            found[id(prompt)] = [block_hash(name) for name in hashes.extend(prompt, len(prompt))]
    return found


def leaders(requests: Sequence[GenerationRequest], min_tokens: int) -> dict[int, int]:
    """Maps each request that has a prompt worth sharing with an earlier request to the earlier one's index: the same
    prompt, or a beginning that all prompts share, such as the query to which many documents are compared.

    Args:
        requests: all of one HTTP request.
        min_tokens: fewer tokens are not worth sharing.
    """
    found = _with_same_prompt(requests, min_tokens)
    if _have_costly_beginning(requests, min_tokens):
        found = {**dict.fromkeys(range(1, len(requests)), 0), **found}
    return found


def _have_costly_beginning(requests: Sequence[GenerationRequest], min_tokens: int) -> bool:
    """Whether the prompts begin with the same tokens, and computing these for each costs more than waiting for the
    first prompt."""
    if len(requests) < 2 or any(r.pooling is Pooling.MEAN or not r.gives_vector for r in requests):
        return False
    prompts = [request.prompt_token_ids or () for request in requests]
    head = prompts[0][:min_tokens]
    if len(head) < min_tokens or any(prompt[:min_tokens] != head for prompt in prompts):
        return False
    pairs = enumerate(zip(prompts[0], prompts[-1], strict=False))
    num_shared = next((i for i, (one, other) in pairs if one != other), min(len(prompts[0]), len(prompts[-1])))
    return num_shared * (len(requests) - 1) >= _WORTH_A_WAIT


def _with_same_prompt(requests: Sequence[GenerationRequest], min_tokens: int) -> dict[int, int]:
    """Maps each request whose whole prompt an earlier request has too to the earlier one's index."""
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
