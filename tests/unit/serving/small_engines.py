"""Small engines with random weights, requests for them, and the oracle: each request run alone."""

from collections.abc import Callable

import pytest
import torch

from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.serving.eager_runner import EagerRunner
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest, GenerationResult, StepOutput

VOCAB_SIZE = 48


def create_model(**shape) -> DecoderModel:
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = DecoderModel(**{"max_seq_len": 128, **defaults, **shape})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def create_engine(
    model: DecoderModel | None = None, *, tokenizer=None, max_steps_ahead: int = 0, **config
) -> ContinuousBatchingEngine:
    """`num_pages` are those of each group of layers."""
    model = model or create_model()
    defaults = {"max_batch_size": 8, "max_tokens_per_step": 64, "page_size": 4}
    if "num_pages" in config:
        config["num_pages"] *= len(model.page_groups)
    engine = ContinuousBatchingEngine(model, tokenizer, config=EngineConfig(**{**defaults, **config}))
    runner = engine.runner
    assert isinstance(runner, EagerRunner)
    engine.runner = EagerRunner(runner.eager, max_steps_ahead=max_steps_ahead)
    return engine


def create_requests(num: int = 6, **params) -> list[GenerationRequest]:
    """Prompts of different lengths; some begin alike, so that the prefix cache has something to find."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, VOCAB_SIZE, (20,), generator=generator).tolist()
    defaults = {"max_new_tokens": 20, "seed": 11}
    requests = []
    for i in range(num):
        own = torch.randint(0, VOCAB_SIZE, (3 + 7 * i,), generator=generator).tolist()
        prompt = [*shared, *own] if i % 2 else own
        requests.append(GenerationRequest(prompt_token_ids=tuple(prompt), **{**defaults, **params}))
    return requests


def run_alone(request: GenerationRequest, model: DecoderModel | None = None) -> GenerationResult:
    """The oracle: a fresh engine with nothing else in it, whole prompt in one step, no prefix cache."""
    engine = create_engine(model, enable_prefix_caching=False, max_tokens_per_step=256)
    return engine.generate([request], progress=False)[0]


def run_steps(engine: ContinuousBatchingEngine, after_step: Callable[[], object] = lambda: None) -> list[StepOutput]:
    """Step until nothing is pending, then check that nothing leaked; returns every output."""
    outputs = []
    while engine.scheduler.has_pending_work:
        outputs += engine.step()
        engine.scheduler.check()
        after_step()
    check_idle(engine)
    return outputs


def tokens_of(outputs: list[StepOutput], request: GenerationRequest) -> tuple[int, ...]:
    return tuple(t for output in outputs if output.request_id == request.request_id for t in output.token_ids)


def check_idle(engine: ContinuousBatchingEngine) -> None:
    engine.scheduler.check()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_pages) == (0, 0, 0)
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages


each_depth = pytest.mark.parametrize("max_steps_ahead", [0, 1], ids=["in step", "ahead"])

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "cut": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
}
MODELS = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "window": {"window_size": 10},
    "qk-norm, one windowed layer": {"qk_norm": True, "window_size": 10, "window_layers": (1,)},
}
CONFIGS = {
    "batched": {},
    "chunked": {"max_tokens_per_step": 8},
    "preempted": {"num_pages": 34, "max_seq_len": 100},
    "preempted without cache": {
        "num_pages": 34,
        "max_seq_len": 100,
        "enable_prefix_caching": False,
        "max_tokens_per_step": 16,
    },
}
