"""Requests of a replica's own, with which an engine shows that it works."""

from deployments.replica.engine_factory import Engine
from llm.serving.schemas import GenerationRequest, Pooling, new_request_id


def own_request(
    engine: Engine,
    *,
    num_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    request_id: str | None = None,
) -> GenerationRequest:
    """A short request for what the engine's model has a head for: tokens, or the labels of a classifier."""
    return GenerationRequest(
        request_id=request_id or new_request_id(),
        prompt_token_ids=(0,) * num_prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=True,
        seed=0,
        pooling=Pooling.LABELS if engine.is_classifier else None,
    )
