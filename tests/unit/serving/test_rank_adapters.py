"""Adapters by request on two processes over gloo: the text and log probabilities of one process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.random_adapter import write_random_adapter
from demo.tasks import TASKS, held_out_cases
from llm.checkpoint.adapter_digest import adapter_digest
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import (
    AdapterFailure,
    AdapterRef,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Pooling,
    StepFailure,
)

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[3] / "configs" / "demo"
SETTINGS = {"max_seq_len": 512, "max_batch_size": 8, "max_adapters": 2, "max_adapter_rank": 8}


def create_engine(size: int, **config) -> ContinuousBatchingEngine:
    return ContinuousBatchingEngine.from_pretrained(
        DEMO, device="cpu", progress=False, dtype=torch.float32,
        config=EngineConfig(**{**SETTINGS, "tensor_parallel_size": size, **config}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[ContinuousBatchingEngine]:
    """Room for two adapters on the device, and a few more in host memory."""
    engine = create_engine(2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[ContinuousBatchingEngine]:
    engine = create_engine(1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapters(alone, tmp_path_factory) -> list[AdapterRef]:
    """Four of different ranks, which change what is drawn."""
    directory = tmp_path_factory.mktemp("adapters")
    return [write_adapter(alone, directory / str(rank), rank) for rank in (1, 3, 4, 8)]


def write_adapter(engine: ContinuousBatchingEngine, directory: Path, rank: int, std: float = 0.1) -> AdapterRef:
    write_random_adapter(engine.model.config, directory, rank=rank, seed=rank, std=std)
    return AdapterRef(name=directory.name, path=str(directory), digest=adapter_digest(directory))


def create_requests(
    engine: ContinuousBatchingEngine, adapters: list[AdapterRef | None], **params
) -> list[GenerationRequest]:
    """One for each adapter, or for the model itself."""
    questions = [case.prompt for task in TASKS for case in held_out_cases(task, 1, seed=3)]
    prompts = [engine.tokenizer.apply_chat_template([{"role": "user", "content": each}]) for each in questions]
    defaults = {"temperature": 0.0, "max_new_tokens": 24, "seed": 5, "ignore_eos": True}
    return [
        GenerationRequest(prompt_token_ids=tuple(prompts[i % len(prompts)]), adapter=adapter, **{**defaults, **params})
        for i, adapter in enumerate(adapters)
    ]


def check_same(found: list[GenerationResult], expected: list[GenerationResult]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.text, ours.token_ids, ours.error) == (theirs.text, theirs.token_ids, None)
        for name in ("logprobs", "prompt_logprobs"):
            values = [[each.logprob for each in getattr(result, name) or ()] for result in (ours, theirs)]
            torch.testing.assert_close(*map(torch.tensor, values), atol=1e-4, rtol=0)


def test_each_alone_and_all_together(engine, alone, adapters):
    """More adapters than slots, and the model itself; greedy and drawn, with log probabilities, and vectors."""
    chosen = [*adapters, None, adapters[0], None, adapters[3]]
    requests = create_requests(alone, chosen, logprobs=2, prompt_logprobs=1)
    requests += create_requests(alone, chosen[:4], temperature=0.9)
    expected = [alone.generate([request], progress=False)[0] for request in requests]
    assert len({result.text for result in expected[:5]}) == 5
    check_same(engine.generate(requests, progress=False), expected)
    check_same([engine.generate([request], progress=False)[0] for request in requests[:3]], expected[:3])
    vectors = create_requests(alone, chosen, pooling=Pooling.MEAN)
    for ours, theirs in zip(*(each.generate(vectors, progress=False) for each in (engine, alone)), strict=True):
        numbers = [torch.frombuffer(bytearray(result.vector), dtype=torch.float32) for result in (ours, theirs)]
        torch.testing.assert_close(*numbers, atol=1e-4, rtol=0)
    engine._adapters.check()


def test_adapters_come_and_go_while_streams_run(engine, alone, adapters):
    """Through two slots and three places; a long stream with one adapter and one without run beside all of them."""
    bytes_of_three = 3 * 2 * engine.runner.adapters.slots[0].nbytes
    engine = create_engine(2, adapter_host_gib=(bytes_of_three + 1) / (1 << 30))
    assert engine._adapters._copies.num_places == 3
    long = create_requests(alone, [adapters[3], None], max_new_tokens=90)
    short = create_requests(alone, [adapters[i % 3] for i in range(9)], max_new_tokens=4)
    expected = [alone.generate([request], progress=False)[0].token_ids for request in (*long, *short)]
    for request in long:
        engine.add_request(request)
    found: dict[str, list[int]] = {request.request_id: [] for request in (*long, *short)}
    rest, held = list(short), set()
    while engine.scheduler.has_pending_work or rest:
        if rest and engine.scheduler.num_waiting < 2:
            engine.add_request(rest.pop(0))
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += output.token_ids
        engine._adapters.check()
        held.add(engine.stats().adapters)
    assert [tuple(found[request.request_id]) for request in (*long, *short)] == expected
    assert len(held) > 6, "they are given up and read again"
    assert engine.unload_adapter(adapters[3].digest)
    assert adapters[3].digest not in engine.stats().adapters
    again = long[0].model_copy(update={"request_id": "again"})
    assert engine.generate([again], progress=False)[0].token_ids == expected[0]
    engine.close()


def test_an_adapter_that_cannot_be_read_fails_alone(engine, alone, adapters, tmp_path):
    damaged, changed = write_adapter(alone, tmp_path / "damaged", 2), write_adapter(alone, tmp_path / "changed", 5)
    (Path(damaged.path) / "adapter_model.safetensors").write_bytes(b"no")
    write_random_adapter(alone.model.config, Path(changed.path), rank=5, seed=99)
    requests = create_requests(alone, [damaged, adapters[1], changed, None])
    results = engine.generate(requests, progress=False)
    for result, kind in zip(results[::2], (AdapterFailure.UNREADABLE, AdapterFailure.CHANGED), strict=True):
        assert (result.finish_reason, result.adapter_failure) == (FinishReason.ERROR, kind)
    check_same(results[1::2], alone.generate(requests[1::2], progress=False))
    engine._adapters.check()


def test_every_process_holds_a_part(engine, alone):
    """Half of one factor of each product, all of the other."""
    ours, theirs = (each.runner.adapters.slots.nbytes for each in (engine, alone))
    assert theirs / 2 < ours < theirs * 0.8


def test_a_rank_that_is_lost_ends_requests_that_wait_for_an_adapter(engine, adapters):
    """Not as the adapter's fault: another replica may continue them. The last test here."""
    pid = engine.rank_process_ids[0]
    for digest in engine.stats().adapters:
        engine.unload_adapter(digest)
    os.kill(pid, signal.SIGSTOP)
    waiting, late = create_requests(engine, [adapters[0], adapters[1]])
    engine.add_request(waiting)
    assert [engine.step() for _ in range(20)] == [[]] * 20
    os.kill(pid, signal.SIGKILL)
    outputs = []
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
    [late_result] = engine.generate([late], progress=False)
    for each in (outputs[-1], late_result):
        assert (each.finish_reason, each.adapter_failure) == (FinishReason.ERROR, None)
        assert "rank 1" in each.error
    assert outputs[-1].step_failure is StepFailure.DEVICE
    engine._adapters.check()
