"""Adapters by request on models cut over ranks: each rank has its part of each adapter. Ranks are threads here."""

import threading
from pathlib import Path

import pytest
import torch
from test_adapters_of_families import logprobs_of, write_adapters
from test_cuts import FAMILIES
from test_lora import CALM
from thread_ranks import parallel_engine

from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.errors import CheckpointError
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterFailure, AdapterRef, FinishReason, GenerationRequest

SIZES = {
    "max_batch_size": 4, "max_tokens_per_step": 32, "num_pages": 120, "max_adapters": 2,
    "adapter_experts": True, "attention_backend": "reference",
}  # fmt: skip


def check_ranks(directory: Path, scratch: Path, **config) -> None:
    """Two adapters and the model itself beside them: log probabilities are those of one process."""
    model = load_decoder(directory, progress=False)
    adapters = write_adapters(model, scratch)
    engines = (
        ContinuousBatchingEngine(model, config=EngineConfig(**SIZES)),
        parallel_engine(directory, **{**SIZES, **config}),
    )
    expected, found = (logprobs_of(engine, adapters) for engine in engines)
    for engine in engines:
        engine._adapters.check()
        engine.close()
    assert not any(torch.equal(one, other) for one, other in zip(expected, [*expected[1:], expected[0]], strict=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_ranks(checkpoints, tmp_path, kind):
    check_ranks(checkpoints(kind, **CALM)[0], tmp_path)


@pytest.mark.parametrize(
    ("kind", "size"), [("llama", 4), ("llama_mqa_biases", 4), ("phi3", 4), ("qwen2_tied", 8), ("gemma2", 4)]
)
def test_more_ranks_than_heads_of_keys(checkpoints, tmp_path, kind, size):
    """Several ranks hold the same rows of the factors of keys and values."""
    check_ranks(checkpoints(kind, **CALM)[0], tmp_path, tensor_parallel_size=size)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_moe", "gpt_oss", "qwen3_moe"])
def test_experts_cut_by_expert(checkpoints, tmp_path, kind):
    """Each rank has the factors of its experts; adapters on shared experts are cut by column still."""
    check_ranks(checkpoints(kind, **CALM)[0], tmp_path, expert_parallel=True)


@pytest.mark.parametrize(
    ("kind", "by_expert"), [("llama", False), ("phi3", False), ("deepseek_v3", False), ("qwen3_moe", True)]
)
def test_kernels_on_two_ranks(checkpoints, tmp_path, kind, by_expert):
    """The tokens that the reference gives on one; the ranks' parts of sums are added up behind the expansion."""
    directory = checkpoints(kind, num_hidden_layers=2 if kind == "deepseek_v3" else 1)[0]
    model = load_decoder(directory, progress=False)
    first, second, _ = write_adapters(model, tmp_path, std=0.5)
    prompts = [(5, 44, 190), (17, 3, 99, 5, 44, 121, 160), (5, 44, 190)]
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt, max_new_tokens=3, temperature=0.0, ignore_eos=True, adapter=adapter, logprobs=1
        )
        for prompt, adapter in zip(prompts, (first, None, second), strict=True)
    ]
    sizes = {**SIZES, "max_batch_size": 3, "max_tokens_per_step": 16, "page_size": 8, "max_seq_len": 64}
    engines = (
        ContinuousBatchingEngine(model, config=EngineConfig(**sizes)),
        parallel_engine(directory, **{**sizes, "attention_backend": "triton", "expert_parallel": by_expert}),
    )
    expected, found = (engine.generate(requests, progress=False) for engine in engines)
    for engine in engines:
        engine.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.error) == (theirs.token_ids, None)
        logprobs = [torch.tensor([each.logprob for each in result.logprobs]) for result in (ours, theirs)]
        torch.testing.assert_close(*logprobs, atol=1e-3, rtol=0)
    assert expected[0].token_ids != expected[2].token_ids


def test_slots_are_smaller_by_rank(checkpoints):
    """Of each product one of the two factors is cut."""
    directory = checkpoints("llama", hidden_size=64, intermediate_size=256)[0]
    sizes = []
    for size in (1, 2, 4):
        engine = parallel_engine(directory, **SIZES, tensor_parallel_size=size)
        sizes.append(engine.runner.adapters.slots.nbytes)
        engine.close()
    assert sizes[0] > 1.3 * sizes[1] > 1.3**2 * sizes[2]


def test_what_one_rank_alone_cannot_read_ends_its_requests_alone(checkpoints, tmp_path):
    """Rank 1 reads on, and its place is used again; the next try may succeed."""
    directory = checkpoints("llama", **CALM)[0]
    adapters: list[AdapterRef | None] = write_adapters(load_decoder(directory, progress=False), tmp_path)
    engine = parallel_engine(directory, **SIZES)
    expected = logprobs_of(engine, adapters)
    for ref in adapters[:2]:
        assert engine.unload_adapter(ref.digest)
    packer = engine._ranks._packers[1]
    read, broken = packer.read, adapters[0].path

    def read_others(path, numbers):
        if str(path) == broken:
            raise CheckpointError("a disk is full")
        return read(path, numbers)

    packer.read = read_others
    requests = [
        GenerationRequest(prompt_token_ids=(5, 6), max_new_tokens=3, adapter=adapter, request_id=f"{i}")
        for i, adapter in enumerate(adapters)
    ]
    results = engine.generate(requests, progress=False)
    assert [result.error for result in results][1:] == [None, None]
    assert (results[0].finish_reason, results[0].adapter_failure) == (FinishReason.ERROR, AdapterFailure.UNREADABLE)
    assert "on rank 1: a disk is full" in results[0].error
    engine._adapters.check()
    assert engine.stats().adapters == (adapters[1].digest,)
    packer.read = read
    for ours, theirs in zip(logprobs_of(engine, adapters), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    engine.close()


def test_others_go_on_until_every_rank_has_an_adapter(checkpoints, tmp_path):
    """Rank 0 has read and copied it long before; its request begins when rank 1 has, too."""
    directory = checkpoints("llama", **CALM)[0]
    adapter = write_adapters(load_decoder(directory, progress=False), tmp_path)[0]
    engine = parallel_engine(directory, **SIZES)
    may_read = threading.Event()
    read = engine._ranks._packers[1].read

    def read_late(*args):
        assert may_read.wait(60)
        return read(*args)

    engine._ranks._packers[1].read = read_late
    waiting, other = (
        GenerationRequest(prompt_token_ids=(5, 6), max_new_tokens=8, ignore_eos=True, adapter=each)
        for each in (adapter, None)
    )
    for request in (waiting, other):
        engine.add_request(request)
    outputs = []
    while not any(output.finish_reason for output in outputs):
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {other.request_id}
    may_read.set()
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
    assert [output.error for output in outputs if output.request_id == waiting.request_id] == [None] * 8
    engine.close()
