"""Engines of several ranks give the tokens of engines of one, whatever is asked of them. Ranks are threads here.

In float32: the ranks' sums are rounded otherwise than one rank's, which no tie of these models is close enough to show.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_layouts import all_layouts, quantize_directory
from thread_ranks import parallel_engine

from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.serving import eager_follower, eager_runner, graph_follower, graph_runner
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, GenerationResult, Pooling

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


def short_requests(num: int = 2, **params) -> list[GenerationRequest]:
    """For kernels in Triton's interpreter."""
    defaults = {"max_new_tokens": 3, "seed": 7, "temperature": 0.0, "ignore_eos": True}
    prompts = [(5, 44, 190), (17, 3, 99, 5, 44, 121, 160)][:num]
    return [GenerationRequest(prompt_token_ids=prompt, **{**defaults, **params}) for prompt in prompts]


def results_of(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> list[GenerationResult]:
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    engine.close()
    return results


def check_same(directory: Path, requests: list[GenerationRequest], tokenizer=None, **config) -> None:
    """Tokens, outcomes, vectors and log probabilities of several ranks are those of one."""
    config = {**SIZES, **config}
    alone = {name: value for name, value in config.items() if name not in ("tensor_parallel_size", "expert_parallel")}
    engine = ContinuousBatchingEngine(load_decoder(directory, progress=False), tokenizer, config=EngineConfig(**alone))
    expected = results_of(engine, requests)
    found = results_of(parallel_engine(directory, tokenizer, **config), requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason, ours.error) == (theirs.token_ids, theirs.finish_reason, None)
        for name in ("logprobs", "prompt_logprobs"):
            pairs = zip(getattr(ours, name) or (), getattr(theirs, name) or (), strict=True)
            assert all(a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-3) for a, b in pairs)


@pytest.mark.parametrize("name", SAMPLING)
def test_two_ranks_give_the_tokens_of_one(checkpoints, name):
    check_same(checkpoints("llama")[0], create_requests(**SAMPLING[name], logprobs=2), attention_backend="reference")


def test_kernels_on_two_ranks_give_the_tokens_of_one(checkpoints):
    """Steps are launched before the last one's tokens are read: those come from rank 0, on the device."""
    requests = [*short_requests(logprobs=2), *short_requests(1, **SAMPLING["penalised"])]
    check_same(checkpoints("llama", num_hidden_layers=1)[0], requests, attention_backend="triton")


@pytest.mark.parametrize(
    ("backend", "expert_parallel"),
    [("reference", False), ("reference", True), ("triton", True)],
    ids=["by column", "by expert", "by expert, kernels"],
)
def test_experts_on_two_ranks(checkpoints, backend, expert_parallel):
    requests = short_requests() if backend == "triton" else create_requests()
    options = {"attention_backend": backend, "expert_parallel": expert_parallel}
    check_same(checkpoints("qwen3_moe", num_hidden_layers=1)[0], requests, **options)


def test_layers_with_states_on_two_ranks(checkpoints):
    check_same(checkpoints("qwen3_5")[0], create_requests(), attention_backend="reference")


def test_snapshots_of_states_on_two_ranks(checkpoints):
    """The second time every rank begins from its part of the snapshots that the first one left."""
    directory, requests = checkpoints("qwen3_5")[0], create_requests()
    config = {**SIZES, "page_size": 4, "attention_backend": "reference"}
    alone = EngineConfig(**config, enable_prefix_caching=False)
    engine = ContinuousBatchingEngine(load_decoder(directory, progress=False), config=alone)
    expected = [result.token_ids for result in results_of(engine, requests)]
    engine = parallel_engine(directory, **config)
    assert [result.token_ids for result in engine.generate(requests, progress=False)] == expected
    num_cached = engine.stats().num_cached_prompt_tokens
    assert [result.token_ids for result in results_of(engine, requests)] == expected
    assert engine.stats().num_cached_prompt_tokens >= num_cached + 20 + 28


def test_windows_have_pages_of_their_own_on_every_rank(checkpoints):
    """Of two groups of layers; a pool so small that sequences are preempted, and a prefix that is found."""
    config = {"attention_backend": "reference", "num_pages": 40, "page_size": 4, "max_seq_len": 70}
    check_same(checkpoints("gemma3")[0], create_requests(6, max_new_tokens=20), **config)


def test_four_ranks_share_two_heads_of_keys(checkpoints):
    check_same(checkpoints("llama")[0], create_requests(), attention_backend="reference", tensor_parallel_size=4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_log_probabilities_of_prompts(checkpoints, monkeypatch, backend):
    """Worked out some at a time, which every rank has to do alike."""
    for module in (eager_runner, eager_follower, graph_runner, graph_follower):
        monkeypatch.setattr(module, "MAX_SCORED_AT_ONCE", 5)
    requests = short_requests(prompt_logprobs=1)
    check_same(checkpoints("llama", num_hidden_layers=1)[0], requests, attention_backend=backend)


def test_guesses_are_checked_on_every_rank(checkpoints):
    """Of two ids the answer repeats itself soon, and is guessed."""
    requests = create_requests(3, max_new_tokens=24, allowed_token_ids=(5, 6))
    directory, config = checkpoints("llama")[0], {**SIZES, "num_speculative_tokens": 3}
    check_same(directory, requests, attention_backend="reference", **config)
    engine = parallel_engine(directory, attention_backend="reference", **config)
    results_of(engine, requests)
    assert engine.stats().num_accepted_tokens


def test_ids_that_a_request_allows(checkpoints):
    """Only rank 0 draws, so what a draw depends on need not be told to others."""
    requests = create_requests(3, allowed_token_ids=tuple(range(20, 30)), temperature=1.0, min_new_tokens=2)
    check_same(checkpoints("llama")[0], requests, attention_backend="reference")


def test_vectors_of_two_ranks(checkpoints):
    directory, config = checkpoints("llama")[0], {**SIZES, "attention_backend": "reference"}
    prompts = [list(request.prompt_token_ids) for request in create_requests()]
    engine = ContinuousBatchingEngine(load_decoder(directory, progress=False), config=EngineConfig(**config))
    ranks = parallel_engine(directory, **config)
    for pooling in (Pooling.LAST, Pooling.MEAN):
        expected = engine.embed(prompts, pooling=pooling, progress=False)
        np.testing.assert_allclose(ranks.embed(prompts, pooling=pooling, progress=False), expected, atol=1e-5)
    ranks.close()


@pytest.mark.parametrize("layout", ["awq 16", "fp8 by block"])
def test_quantized_weights_on_two_ranks(checkpoints, tmp_path, layout):
    layouts = dict(all_layouts())
    quantize_directory(checkpoints("llama", intermediate_size=128)[0], tmp_path, layouts[layout])
    check_same(tmp_path, create_requests(2), attention_backend="reference")


def test_deterministic_tokens_do_not_depend_on_company(checkpoints):
    """Kernels with fixed cuts on both ranks."""
    config = {**SIZES, "attention_backend": "triton", "deterministic": True}
    requests = short_requests()
    engine = parallel_engine(checkpoints("llama", num_hidden_layers=1)[0], **config)
    together = [each.token_ids for each in engine.generate(requests, progress=False)]
    alone = [engine.generate([each], progress=False)[0].token_ids for each in requests]
    engine.close()
    assert alone == together


def test_a_layer_sums_twice(checkpoints):
    """And once for the embeddings."""
    directory = checkpoints("llama")[0]
    engine = parallel_engine(directory, **SIZES, attention_backend="reference")
    exchange = engine.model.exchange
    results_of(engine, create_requests(1, max_new_tokens=1))
    assert exchange.num_reductions == 1 + 2 * engine.model.num_layers


def test_one_token_s_experts_by_column(checkpoints):
    """A step of one token has kernels of its own where sizes are whole: it reads each expert's weights once."""
    request = GenerationRequest(prompt_token_ids=(5,), max_new_tokens=4, temperature=0, ignore_eos=True)
    check_same(checkpoints("qwen3_moe", num_hidden_layers=1)[0], [request], attention_backend="triton")
