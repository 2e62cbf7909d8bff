"""Engines of several ranks give the tokens of engines of one, whatever is asked of them. Ranks are threads here.

In float32: the ranks' sums are rounded otherwise than one rank's, which no tie of these models is close enough to show.
"""

import pytest
import torch
from thread_ranks import parallel_engine

from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "cut": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
}
SIZES = {"max_batch_size": 3, "max_tokens_per_step": 16, "num_pages": 96, "page_size": 8, "max_seq_len": 128}


def create_requests(num: int = 4, **params) -> list[GenerationRequest]:
    """Within a step's budget and over it; two begin alike, with more than a page."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 190, (17,), generator=generator).tolist()
    requests = []
    for i in range(num):
        own = torch.randint(3, 190, (1 + 4 * i,), generator=generator).tolist()
        prompt = [*shared, *own] if i % 2 else own
        defaults = {"max_new_tokens": 4 + i, "seed": 7, "temperature": 0.0, "ignore_eos": True}
        requests.append(GenerationRequest(prompt_token_ids=tuple(prompt), **{**defaults, **params}))
    return requests


def results_of(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> list:
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    engine.close()
    return results


def check_same(directory, requests: list[GenerationRequest], **config) -> None:
    """Tokens and outcomes of two ranks are those of one; log probabilities are within rounding."""
    config = {**SIZES, **config}
    alone = {name: value for name, value in config.items() if name not in ("tensor_parallel_size", "expert_parallel")}
    engine = ContinuousBatchingEngine(load_decoder(directory, progress=False), config=EngineConfig(**alone))
    expected = results_of(engine, requests)
    found = results_of(parallel_engine(directory, **config), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason, ours.error) == (theirs.token_ids, theirs.finish_reason, None)
        assert [e.token_id for e in ours.logprobs or ()] == [e.token_id for e in theirs.logprobs or ()]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", SAMPLING)
def test_two_ranks_give_the_tokens_of_one(checkpoints, name, backend):
    num = 4 if backend == "reference" else 2
    requests = create_requests(num, **SAMPLING[name], logprobs=2)
    check_same(checkpoints("llama")[0], requests, attention_backend=backend)
