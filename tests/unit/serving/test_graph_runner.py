"""The fused forward pass on rows: the same tokens as the reference, however requests come and go.

On a CPU the kernels run in Triton's interpreter, one by one, without graphs; on a GPU as they are.
"""

import gc
import weakref

import pytest
import torch

from llm.config import EngineConfig
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 80


def create_model(**shape) -> DecoderModel:
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = DecoderModel(max_seq_len=256, device=DEVICE, **{**defaults, **shape})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def create_engine(model: DecoderModel, backend: str, **config) -> ContinuousBatchingEngine:
    defaults = {"max_batch_size": 3, "max_tokens_per_step": 16, "num_pages": 64, "page_size": 8}
    config = EngineConfig(attention_backend=backend, **{**defaults, **config})
    return ContinuousBatchingEngine(model, config=config)


def run(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> list:
    """Tokens and outcome of each request; nothing may leak."""
    results = engine.generate(requests, progress=False)
    engine.scheduler.check()
    assert engine.scheduler.pool.num_used == 0
    return [(result.token_ids, result.finish_reason) for result in results]


def create_requests(num: int = 4, num_shared: int = 9, **params) -> list[GenerationRequest]:
    """Of one token, within a step's budget and over it; two begin alike, with more than a page."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(0, VOCAB_SIZE, (num_shared,), generator=generator).tolist()
    requests = []
    for i in range(num):
        own = torch.randint(0, VOCAB_SIZE, (1 + 4 * i,), generator=generator).tolist()
        prompt = [*shared, *own] if i % 2 else own
        defaults = {"max_new_tokens": 2 + i, "seed": 7, "temperature": 0.0, "ignore_eos": True}
        requests.append(GenerationRequest(prompt_token_ids=tuple(prompt), **{**defaults, **params}))
    return requests


GEMMA = {"norm_offset": 1.0, "embedding_scale": 32**0.5, "activation": "gelu_tanh", "tie_embeddings": True}
GEMMA_2 = {
    **GEMMA, "architecture": "Gemma2ForCausalLM", "window_size": 6, "window_layers": (0,), "attention_scale": 0.4,
    "attention_soft_cap": 3.0, "logit_soft_cap": 5.0,
}  # fmt: skip
GEMMA_3 = {
    **GEMMA, "architecture": "Gemma3ForCausalLM", "window_size": 6, "window_layers": (0,), "window_rope_theta": 100.0,
    "qk_norm": True,
}  # fmt: skip

GPT_OSS = {
    "architecture": "GptOssForCausalLM", "attention_sinks": True, "window_size": 6, "window_layers": (0,),
    "norm_offset": 0.0, "attention_bias": True, "num_experts": 5, "expert_size": 24, "expert_bias": True,
    "swiglu_limit": 0.5,
}  # fmt: skip
QWEN_3_5 = {
    "architecture": "Qwen3_5ForCausalLM", "num_layers": 3, "norm_offset": 1.0, "qk_norm": True, "attention_gate": True,
    "partial_rotary_factor": 0.5,
    "delta": {"layers": (0, 2), "num_key_heads": 1, "num_value_heads": 2, "key_dim": 12, "value_dim": 8},
}  # fmt: skip
QWEN_3_5_MOE = {
    **QWEN_3_5, "architecture": "Qwen3_5MoeForCausalLM", "num_experts": 5, "expert_size": 24, "shared_expert_size": 40,
    "shared_expert_gate": True,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architecture": "DeepseekV3ForCausalLM", "num_kv_heads": 1, "head_dim": 28, "attention_scale": 0.3,
    "latent": {"rank": 20, "query_rank": 24, "plain_dim": 12, "rope_dim": 8, "value_dim": 10},
    "num_experts": 6, "expert_size": 24, "shared_expert_size": 16, "dense_layers": (0,),
    "routing": {"uses_sigmoid": True, "num_groups": 3, "num_top_groups": 2, "scale": 2.5},
}  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [{}, {"qk_norm": True, "tie_embeddings": True}, {"attention_bias": True, "num_kv_heads": 1}, {"window_size": 6},
     {"window_size": 6, "window_layers": (1,)}, {"mlp_bias": True, "attention_output_bias": True, "num_kv_heads": 4},
     {"architecture": "Qwen3MoeForCausalLM", "num_experts": 5, "expert_size": 24, "dense_layers": (0,)},
     GEMMA_2, GEMMA_3,
     GPT_OSS,
     QWEN_3_5, QWEN_3_5_MOE, DEEPSEEK_V3],
    ids=["llama", "qwen3", "qwen2 mqa", "mistral", "window in one layer", "biases", "experts", "gemma2", "gemma3",
         "gpt-oss", "qwen3.5", "qwen3.5 with experts", "deepseek v3"],
)  # fmt: skip
def test_greedy_tokens_equal_the_reference(shape):
    """Prompts in chunks beside decodes, more requests than rows, shared prefixes."""
    model = create_model(**shape)
    requests = create_requests()
    engine = create_engine(model, "triton")
    assert run(engine, requests) == run(create_engine(model, "reference"), requests)
    assert (engine.stats().num_cached_prompt_tokens > 0) is not bool(model.delta_specs)


def test_prompts_by_chunks_equal_the_reference():
    """Long enough that the gated delta rule is worked out by chunks, beside a short one that is walked through."""
    model = create_model(**QWEN_3_5)
    requests = [
        GenerationRequest(prompt_token_ids=tuple(range(1, 1 + num)), max_new_tokens=3, temperature=0.0, ignore_eos=True)
        for num in (45, 7)
    ]
    config = {"max_tokens_per_step": 64, "enable_prefix_caching": False}
    ours, expected = (run(create_engine(model, backend, **config), requests) for backend in ("triton", "reference"))
    assert ours == expected


def test_states_from_snapshots_equal_the_reference():
    """The second time prompts begin behind their last whole page, on whichever row they get."""
    model = create_model(**QWEN_3_5)
    requests = [request for request in create_requests(num_shared=17) if len(request.prompt_token_ids) > 17]
    engine = create_engine(model, "triton", page_size=4)
    expected = run(create_engine(model, "reference", enable_prefix_caching=False), requests)
    assert [run(engine, requests), run(engine, requests[::-1])] == [expected, expected[::-1]]
    assert engine.stats().num_cached_prompt_tokens >= 20 + 28


@pytest.mark.parametrize(
    "params",
    [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.02},
     {"temperature": 1.0, "presence_penalty": 1.5, "repetition_penalty": 1.3},
     {"temperature": 0.5, "logit_bias": {3: 4.0}, "min_new_tokens": 3}],
    ids=["plain", "cuts", "penalties", "bias and minimum"],
)  # fmt: skip
def test_sampled_tokens_equal_the_reference(params):
    model = create_model()
    requests = create_requests(**params)
    assert run(create_engine(model, "triton"), requests) == run(create_engine(model, "reference"), requests)


def test_preempted_tokens_equal_the_reference():
    """A pool so small that sequences are sent back and recomputed on other rows and pages."""
    model = create_model()
    requests = [
        GenerationRequest(prompt_token_ids=tuple(range(i, i + 9)), max_new_tokens=18, temperature=0) for i in range(3)
    ]
    small = {"num_pages": 6, "enable_prefix_caching": False, "page_size": 8, "max_seq_len": 40}
    engine = create_engine(model, "triton", **small)
    tokens = run(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert tokens == run(create_engine(model, "reference", **small), requests)


@pytest.mark.parametrize("shape", [{}, GEMMA_2], ids=["llama", "gemma2"])
def test_log_probabilities_equal_the_reference(shape):
    model = create_model(**shape)
    requests = create_requests(2, logprobs=3)
    engines = [create_engine(model, name) for name in ("triton", "reference")]
    ours, expected = (engine.generate(requests, progress=False) for engine in engines)
    for result, reference in zip(ours, expected, strict=True):
        for drawn, wanted in zip(result.logprobs, reference.logprobs, strict=True):
            assert drawn.token_id == wanted.token_id
            assert drawn.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [i for i, _ in drawn.top] == [i for i, _ in wanted.top]


def test_latents_in_8_bits_are_refused():
    with pytest.raises(ConfigError, match="kv_cache_dtype: fp8: DeepseekV3ForCausalLM keeps one latent vector a token"):
        create_engine(create_model(**DEEPSEEK_V3), "triton", kv_cache_dtype="fp8")


def test_an_engine_that_is_given_up_is_gone_at_once():
    """Nothing of it waits for the garbage collector, with its share of the GPU's memory."""
    engine = create_engine(create_model(), "triton")
    run(engine, create_requests(2, prompt_logprobs=1))
    runner = weakref.ref(engine.runner)
    gc.collect()
    gc.disable()
    try:
        del engine
        assert runner() is None
    finally:
        gc.enable()
