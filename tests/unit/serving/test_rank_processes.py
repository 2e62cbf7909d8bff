"""The demo model on two processes over gloo: the text of one process, and an engine that ends with a process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.tasks import TASKS, held_out_cases
from llm.config import EngineConfig, ModelConfig
from llm.errors import CheckpointError, ConfigError
from llm.models.decoder import DecoderModel
from llm.serving.checks import check_features
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, Grammar, GrammarKind, StepFailure

DEMO = Path(__file__).parents[3] / "configs" / "demo"


def create_engine(size: int, **config) -> ContinuousBatchingEngine:
    return ContinuousBatchingEngine.from_pretrained(
        DEMO, device="cpu", progress=False, config=EngineConfig(tensor_parallel_size=size, max_seq_len=512, **config)
    )


@pytest.fixture(scope="module")
def engine() -> Iterator[ContinuousBatchingEngine]:
    engine = create_engine(2)
    yield engine
    engine.close()


def create_requests(engine: ContinuousBatchingEngine, **params) -> list[GenerationRequest]:
    questions = [case.prompt for task in TASKS for case in held_out_cases(task, 1, seed=3)]
    prompts = [engine.tokenizer.apply_chat_template([{"role": "user", "content": each}]) for each in questions]
    defaults = {"temperature": 0.0, "max_new_tokens": 40}
    return [GenerationRequest(prompt_token_ids=tuple(prompt), **{**defaults, **params}) for prompt in prompts]


def test_text_is_that_of_one_process(engine):
    """Greedy and drawn, all at once; a grammar's too."""
    alone = create_engine(1)
    requests = [
        *create_requests(engine),
        *create_requests(engine, temperature=0.9, seed=4)[:3],
        *create_requests(engine, grammar=Grammar(kind=GrammarKind.REGEX, text="[0-9]{3}-[a-f]{2}"))[:2],
    ]
    for ours, theirs in zip(
        engine.generate(requests, progress=False), alone.generate(requests, progress=False), strict=True
    ):
        assert (ours.text, ours.token_ids, ours.error) == (theirs.text, theirs.token_ids, None)


def test_a_rank_that_is_killed_is_the_engine_s_end(engine):
    """Its requests end at once, and so does whatever is asked of it later; no process is left. The last test here."""
    pids = engine.rank_process_ids
    for request in create_requests(engine, ignore_eos=True, max_new_tokens=300):
        engine.add_request(request)
    engine.step()
    os.kill(pids[0], signal.SIGKILL)
    start = time.monotonic()
    outputs = []
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
    assert time.monotonic() - start < 5
    assert "rank 1 has ended, killed by signal 9" in engine.failure
    failed = [output for output in outputs if output.finish_reason is FinishReason.ERROR]
    assert len(failed) == len(TASKS)
    assert {output.step_failure for output in failed} == {StepFailure.DEVICE}
    engine.scheduler.check()
    late = engine.generate(create_requests(engine)[:1], progress=False)
    assert "rank 1 has ended" in late[0].error
    assert not Path(f"/proc/{pids[0]}").exists()


def test_what_cannot_be_loaded_is_said_as_one_process_says_it(tmp_path):
    """By rank 0, which looks at the files itself; the others are gone then."""
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    config = EngineConfig(tensor_parallel_size=2)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        ContinuousBatchingEngine.from_pretrained(tmp_path, device="cpu", config=config)


def test_a_model_that_ranks_cannot_load_is_refused():
    with pytest.raises(ConfigError, match="use from_pretrained"):
        ContinuousBatchingEngine(DecoderModel(max_seq_len=64), config=EngineConfig(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("shape", "reason"), [({}, "experts, which LlamaForCausalLM lacks"), ({"num_experts": 4}, "above 1")]
)
def test_experts_that_nobody_can_share_out_are_refused(shape, reason):
    with pytest.raises(ConfigError, match=f"expert_parallel: true needs .*{reason}"):
        check_features(ModelConfig(expert_size=8, **shape), EngineConfig(expert_parallel=True))
