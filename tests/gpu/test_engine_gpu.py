"""The engine on a GPU: the same text as on the CPU in float32, sound in float16 and bfloat16."""

from pathlib import Path

import pytest
import torch
import triton

from llm.config import EngineConfig
from llm.sampling.draw import exponential_noise
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEMO = Path(__file__).parents[2] / "configs" / "demo"
QUESTIONS = ["What is 17 + 25?", "Spell 'river' backwards.", "Count from 1 to 40.", "What comes next: 2, 4, 6, 8?"]


def answers(device: str, dtype: torch.dtype, **sampling) -> list[str]:
    tokenizer = HFTokenizer.from_pretrained(DEMO)
    engine = ContinuousBatchingEngine.from_pretrained(
        DEMO, device=device, dtype=dtype, progress=False, config=EngineConfig(num_pages=256)
    )
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    requests = [GenerationRequest(prompt_token_ids=tuple(prompt), seed=5, **sampling) for prompt in prompts]
    return [result.text for result in engine.generate(requests, progress=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_answers_equal_the_cpus(dtype):
    """The demo model is sure enough of its answers that no number format changes them."""
    assert answers("cuda", dtype, temperature=0.0) == answers("cpu", torch.float32, temperature=0.0)


def test_sampled_answers_equal_the_cpus():
    """The same seed draws the same tokens on either device."""
    assert answers("cuda", torch.float32, temperature=1.0) == answers("cpu", torch.float32, temperature=1.0)


def test_noise_is_the_same_on_every_device():
    on_cpu = exponential_noise([(1, 2), (2**63 - 1, 4000)], 5000, "cpu")
    on_gpu = exponential_noise([(1, 2), (2**63 - 1, 4000)], 5000, "cuda").cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-9)


def test_pool_takes_its_share_of_the_memory():
    """The pool is sized by what is left, and what is asked for stays free."""
    engine = ContinuousBatchingEngine.from_pretrained(
        DEMO, device="cuda", progress=False, config=EngineConfig(gpu_memory_utilization=0.5)
    )
    free, total = torch.cuda.mem_get_info()
    assert engine.num_slots > 1_000_000
    assert 0.45 * total < free < 0.6 * total


def test_a_burst_compiles_nothing(monkeypatch):
    """What the largest steps run is compiled at the start: a burst on a new machine would wait for it."""
    config = EngineConfig(num_pages=2048, enable_prefix_caching=False)
    engine = ContinuousBatchingEngine.from_pretrained(DEMO, device="cuda", progress=False, config=config)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]))
    for num_requests, length in ((4, 400), (12, 350), (60, 400)):
        prompts = [tuple(1 + (i + j) % 50 for j in range(length)) for i in range(num_requests)]
        requests = [GenerationRequest(prompt_token_ids=prompt, max_new_tokens=8, temperature=0.7) for prompt in prompts]
        assert all(result.finish_reason for result in engine.generate(requests, progress=False))
    assert compiled == []
