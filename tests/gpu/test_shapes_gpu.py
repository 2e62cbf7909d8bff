"""Fused kernels and graphs against the reference backend on the GPU, for the shapes of known models."""

from collections.abc import Sequence

import pytest
import torch
from known_shapes import SHAPES

from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENS = [1, 2, 16, 17, 63, 128, 300, 700, 1500, *range(5, 100, 3)]


def create_model(shape: dict, dtype: torch.dtype, max_seq_len: int = 4096) -> DecoderModel:
    torch.manual_seed(0)
    model = DecoderModel(vocab_size=4000, num_layers=2, max_seq_len=max_seq_len, device="cuda", dtype=dtype, **shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def create_requests(lens: Sequence[int] = LENS, **params) -> list[GenerationRequest]:
    """Prompts from one token to several chunks; enough of them for small and large batches."""
    generator = torch.Generator().manual_seed(1)
    defaults = {"max_new_tokens": 24, "temperature": 0.0, "ignore_eos": True, "seed": 3}
    return [
        GenerationRequest(
            prompt_token_ids=tuple(torch.randint(0, 4000, (n,), generator=generator).tolist()), **{**defaults, **params}
        )
        for n in lens
    ]


def generate(model: DecoderModel, backend: str, requests: list[GenerationRequest], **config) -> list:
    defaults = {"max_batch_size": 64, "max_tokens_per_step": 512, "num_pages": 1000, "max_seq_len": 4096}
    config = EngineConfig(attention_backend=backend, **{**defaults, **config})
    engine = ContinuousBatchingEngine(model, config=config)
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    return results


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_tokens_equal_the_reference(shape):
    """In float32, where no two tokens of a random model are tied."""
    model = create_model(shape, torch.float32)
    requests = create_requests()
    ours, expected = generate(model, "triton", requests), generate(model, "reference", requests)
    assert [result.token_ids for result in ours] == [result.token_ids for result in expected]


@pytest.mark.parametrize("lens", [[9000], [100, 5000, 9000, 6000], [*range(200, 400, 2)]], ids=["one", "few", "many"])
def test_greedy_tokens_in_an_engine_of_many_rows(lens):
    """Contexts that are cut among programs, in steps with far fewer parts than there are rows."""
    model = create_model(SHAPES["qwen3-0.6b"], torch.float32, max_seq_len=10_000)
    requests, config = create_requests(lens), {"max_batch_size": 256, "max_seq_len": 10_000, "num_pages": 4000}
    ours, expected = (generate(model, backend, requests, **config) for backend in ("triton", "reference"))
    assert [result.token_ids for result in ours] == [result.token_ids for result in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_are_as_exact_as_the_references(shape, dtype):
    """In 16 bits: as near to float32 as the reference is in 16 bits, which rounds elsewhere and more often.

    For first tokens after prompts of every length, and for a second by decode.
    """
    model = create_model(shape, dtype)
    requests = create_requests(max_new_tokens=1, logprobs=0)
    requests += create_requests(max_new_tokens=2, logprobs=0, output_token_ids=(7,))
    ours, reference = (logprobs(model, backend, requests) for backend in ("triton", "reference"))
    exact = logprobs(model.float(), "reference", requests)
    # Of two experts that are nearly tied either may be chosen, in a few of the rows, which are then left out.
    share = 0.9 if "num_experts" in shape else 1.0
    errors, allowed = (
        (results - exact).abs().sort().values[: int(len(exact) * share)] for results in (ours, reference)
    )
    assert errors.norm() < 1.25 * allowed.norm()


def logprobs(model: DecoderModel, backend: str, requests: list[GenerationRequest]) -> torch.Tensor:
    return torch.tensor([result.logprobs[0].logprob for result in generate(model, backend, requests)])


@pytest.mark.parametrize("shape", ["gemma-2-9b with lower caps", "gemma-3-4b", "gemma-3-27b", "heads of 256"])
def test_large_steps_of_wide_heads_equal_the_reference(shape):
    """Steps of thousands of tokens have larger tiles, whose stages have to fit the chip beside heads of 256."""
    model = create_model(SHAPES[shape], torch.bfloat16, max_seq_len=8192)
    requests = create_requests([5000, 100, 600], max_new_tokens=2, logprobs=0, output_token_ids=(7,))
    config = {"max_tokens_per_step": 8192, "max_seq_len": 8192, "num_pages": 2000}
    ours, expected = (
        torch.tensor([result.logprobs[0].logprob for result in generate(model, backend, requests, **config)])
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.08)


def test_preempted_tokens_equal_undisturbed_ones():
    """A pool of a fraction of the demand, so that sequences move between rows and pages."""
    model = create_model(SHAPES["qwen3-0.6b"], torch.float32)
    requests = create_requests()
    undisturbed = generate(model, "triton", requests)
    disturbed = generate(model, "triton", requests, num_pages=120, enable_prefix_caching=False)
    assert [result.token_ids for result in disturbed] == [result.token_ids for result in undisturbed]


def test_long_sequence_holds_its_window():
    """A sequence of 32,000 tokens with a window of 4,096 keeps the pages of its window, not of its length."""
    shape = {**SHAPES["qwen3-0.6b"], "window_size": 4096}
    torch.manual_seed(0)
    model = DecoderModel(
        vocab_size=4000, num_layers=2, max_seq_len=33_000, device="cuda", dtype=torch.bfloat16, **shape
    )
    engine = ContinuousBatchingEngine(model, config=EngineConfig(max_batch_size=4, num_pages=2000))
    prompt = tuple(torch.randint(0, 4000, (32_000,)).tolist())
    engine.add_request(GenerationRequest(prompt_token_ids=prompt, max_new_tokens=64, ignore_eos=True))
    most_while_decoding = 0
    num_tokens = 0
    while engine.scheduler.has_pending_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
        if num_tokens > 2:
            most_while_decoding = max(most_while_decoding, engine.stats().num_used_pages)
    assert num_tokens == 64
    assert most_while_decoding <= 4096 // 16 + 2


def test_steps_do_not_wait_for_the_device():
    """Launching a decode step makes the host wait for nothing."""
    model = create_model(SHAPES["qwen3-0.6b"], torch.bfloat16)
    engine = ContinuousBatchingEngine(model, config=EngineConfig(max_batch_size=16, num_pages=400))
    for request in create_requests(max_new_tokens=40)[:12]:
        engine.add_request(request)
    for _ in range(20):
        engine.step()
    launch = engine.runner.launch

    def launch_without_waiting(plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.launch = launch_without_waiting
    while engine.scheduler.has_pending_work:
        engine.step()
