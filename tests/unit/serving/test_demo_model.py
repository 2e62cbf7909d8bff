"""The demo model through the engine: right answers, the same text as transformers gives, alone and together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from demo.tasks import TASKS, held_out_cases, is_correct
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, GenerationResult
from llm.tokenization.hf_tokenizer import HFTokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo"
SHORT_TASKS = [name for name, task in TASKS.items() if not task.is_long]


@pytest.fixture(scope="module")
def engine() -> ContinuousBatchingEngine:
    return ContinuousBatchingEngine.from_pretrained(DEMO, device="cpu", progress=False)


def create_request(engine: ContinuousBatchingEngine, question: str, **params) -> GenerationRequest:
    assert isinstance(engine.tokenizer, HFTokenizer)
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return GenerationRequest(prompt_token_ids=tuple(prompt), **{"temperature": 0.0, "max_new_tokens": 200, **params})


def run(engine: ContinuousBatchingEngine, questions: list[str]) -> list[GenerationResult]:
    return engine.generate([create_request(engine, question) for question in questions], progress=False)


@pytest.mark.parametrize("task", SHORT_TASKS)
def test_held_out_cases_are_answered(engine, task):
    """At least 39 of 40 held-out cases of every task, all 40 at once through the engine."""
    cases = held_out_cases(task, 40, seed=1)
    results = run(engine, [case.prompt for case in cases])
    assert sum(is_correct(case, result.text) for case, result in zip(cases, results, strict=True)) >= 39


@torch.inference_mode()
def test_same_text_as_transformers(engine):
    """Greedy and batched: each token is the one that transformers' model finds likeliest behind those before it."""
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    questions = [case.prompt for task in TASKS for case in held_out_cases(task, 2, seed=2)]
    requests = [create_request(engine, question) for question in questions]
    for request, result in zip(requests, engine.generate(requests, progress=False), strict=True):
        num_prompt, ids = len(request.prompt_token_ids), (*request.prompt_token_ids, *result.token_ids)
        likeliest = model(torch.tensor([ids])).logits[0, num_prompt - 1 : -1].argmax(-1)
        assert result.token_ids == tuple(likeliest.tolist())
        ends = [i for i, token_id in enumerate(likeliest.tolist()) if token_id == model.config.eos_token_id]
        assert ends == [len(result.token_ids) - 1] if ends else len(result.token_ids) == 200


def test_an_engine_of_ids_ends_where_one_with_text_does(tmp_path):
    """A checkpoint that names its end-of-turn token with the tokenizer only ends there, tokenizer kept or not."""
    shutil.copytree(DEMO, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        content = json.loads(path.read_text())
        del content["eos_token_id"]
        path.write_text(json.dumps(content))
    with_text, ids_only = (
        ContinuousBatchingEngine.from_pretrained(tmp_path / "model", device="cpu", progress=False, with_tokenizer=kept)
        for kept in (True, False)
    )
    request = create_request(with_text, "What is 17 + 25?")
    (expected,), (result,) = (engine.generate([request], progress=False) for engine in (with_text, ids_only))
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == expected.token_ids
    assert ids_only.tokenizer is None


def test_end_ids_that_the_model_does_not_have_fail_no_step(tmp_path, engine):
    """A checkpoint that names some beside its own: the same answers, also where no end is allowed for a while."""
    shutil.copytree(DEMO, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "eos_token_id": [content["eos_token_id"], 264, 2**31, -1]}))
    other = ContinuousBatchingEngine.from_pretrained(tmp_path / "model", device="cpu", progress=False)
    requests = [create_request(engine, "What is 17 + 25?", min_new_tokens=n, max_new_tokens=20) for n in (0, 10)]
    expected, found = (each.generate(requests, progress=False) for each in (engine, other))
    assert [(result.text, result.finish_reason) for result in found] == [
        (result.text, result.finish_reason) for result in expected
    ]
    assert found[0].text == "42"
