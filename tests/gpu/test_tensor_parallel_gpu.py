"""An engine on two GPUs: the tokens of one GPU's, through NCCL and through peer memory; and what a lost rank does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_gpu_checkpoint import create_requests, make_engine, write_checkpoint

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter_digest import adapter_digest
from llm.checkpoint.model_config import load_model_config
from llm.serving.schemas import AdapterRef

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def generate(directory: Path, num_gpus: int, requests: list, **options) -> list:
    engine = make_engine(directory, num_gpus, **options)
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    engine.close()
    return results


@pytest.mark.parametrize("peer", ["0", "1"], ids=["nccl", "peer memory"])
def test_two_gpus_give_the_tokens_of_one(directory, monkeypatch, peer):
    """In float32, greedy and drawn; prompts in chunks beside decodes, graphs captured and replayed."""
    monkeypatch.setenv("RAYLINE_PEER_ALL_REDUCE", peer)
    requests = [*create_requests(), *create_requests(4, temperature=0.8, repetition_penalty=1.1, logprobs=2)]
    alone, together = (generate(directory, num_gpus, requests) for num_gpus in (1, 2))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_adapters_on_two_gpus_give_the_tokens_of_one(directory, tmp_path):
    """More adapters than slots, of different ranks, beside the model itself: prompts in chunks, then captured steps."""
    model = load_model_config(directory)
    adapters: list[AdapterRef | None] = [None]
    for rank in (3, 16, 8):
        write_random_adapter(model, tmp_path / str(rank), rank=rank, seed=rank, std=0.05)
        path = str(tmp_path / str(rank))
        adapters.append(AdapterRef(name=str(rank), path=path, digest=adapter_digest(path)))
    requests = [
        request.model_copy(update={"adapter": adapters[i % 4]})
        for i, request in enumerate([*create_requests(), *create_requests(4, temperature=0.8, logprobs=2)])
    ]
    options = {"max_adapters": 2, "max_adapter_rank": 16}
    alone, together = (generate(directory, num_gpus, requests, **options) for num_gpus in (1, 2))
    assert {each.error for each in together} == {None}
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    base = generate(directory, 2, [each.model_copy(update={"adapter": None}) for each in requests])
    assert [ours.token_ids != theirs.token_ids for ours, theirs in zip(together[:8], base[:8], strict=True)] == [
        request.adapter is not None for request in requests[:8]
    ]


def test_log_probabilities_in_bf16_are_near_one_gpu_s(directory):
    requests = create_requests(max_new_tokens=1, logprobs=0)
    values = [
        torch.tensor([each.logprobs[0].logprob for each in generate(directory, num, requests, dtype=torch.bfloat16)])
        for num in (1, 2)
    ]
    assert (values[0] - values[1]).abs().median() < 0.1


def test_deterministic_is_the_same_alone_and_together(directory):
    engine = make_engine(directory, 2, dtype=torch.bfloat16, deterministic=True)
    requests = create_requests(8)
    together = engine.generate(requests, progress=False)
    alone = [engine.generate([request], progress=False)[0] for request in create_requests(8)]
    engine.close()
    assert [each.token_ids for each in alone] == [each.token_ids for each in together]


@pytest.mark.parametrize(("how", "most_s"), [("SIGKILL", 5), ("SIGSTOP", 6)])
def test_a_lost_rank_is_the_engine_s_end_within_seconds(directory, how, most_s):
    """In the middle of captured steps; the rank that stands still is found by its silence, and killed."""
    program = Path(__file__).with_name("lose_a_rank.py")
    done = subprocess.run(
        [sys.executable, str(program), str(directory), how], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )  # fmt: skip
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["s"] < most_s, result
    assert result["failures"] == ["device"], result
    assert result["left"] == [], result
