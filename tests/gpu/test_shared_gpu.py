"""Two engines on one GPU, each in a process of its own with a part of the memory."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEMO = Path(__file__).parents[2] / "configs" / "demo"
SHARE = 0.25
_CONTEXTS_BYTES = 2 << 30
"""More than what the driver keeps for one process beside what its engine was granted."""


def serve(pipe: Connection) -> None:
    """Load a replica's engine with a share of the GPU, tell its pool, and answer when asked to."""
    from deployments.model_config import ServedModelConfig
    from deployments.replica.engine_factory import make_engine
    from llm.serving.schemas import GenerationRequest

    config = ServedModelConfig.model_validate({"model": str(DEMO), "replicas": {"num_gpus": SHARE}})
    engine, info = make_engine(config)
    pipe.send((info.num_slots, torch.cuda.memory_reserved()))
    pipe.recv()
    engine.add_request(GenerationRequest(prompt_token_ids=tuple(range(5, 200)), max_new_tokens=50, ignore_eos=True))
    num_tokens = 0
    while engine.scheduler.has_pending_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    pipe.send(num_tokens)
    pipe.recv()
    try:
        torch.empty(int(torch.cuda.get_device_properties(0).total_memory * SHARE), dtype=torch.uint8, device="cuda")
        pipe.send("taken")
    except torch.OutOfMemoryError:
        pipe.send("refused")
    engine.close()


def test_engines_with_shares_fit_beside_each_other_and_keep_to_them():
    """The second one's pool is as large as the first one's, whatever that has taken, and no process can take more."""
    total = torch.cuda.get_device_properties(0).total_memory
    before = free_bytes()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,))
        process.start()
        pipes.append(ours)
        processes.append(process)
    told = [told_by(pipe, process) for pipe, process in zip(pipes, processes, strict=True)]
    (first_slots, first_bytes), (second_slots, second_bytes) = told
    assert second_slots == pytest.approx(first_slots, rel=0.05)
    assert max(first_bytes, second_bytes) <= total * SHARE
    assert before - free_bytes() <= 2 * (total * SHARE + _CONTEXTS_BYTES)
    for asked in (50, "refused"):
        for pipe in pipes:
            pipe.send("go on")
        assert [told_by(pipe, process) for pipe, process in zip(pipes, processes, strict=True)] == [asked, asked]
    for process in processes:
        process.join(60)


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def told_by(pipe: Connection, process: multiprocessing.process.BaseProcess) -> object:
    """What a process has sent, once it has."""
    ends_at = time.monotonic() + 300
    while not pipe.poll(0.1):
        assert process.is_alive(), "it ended"
        assert time.monotonic() < ends_at, "it says nothing"
    return pipe.recv()
