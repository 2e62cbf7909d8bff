"""Every family's requests choose adapters on every projection that it has: each equals a model with it merged."""

from pathlib import Path

import pytest
import torch
from quantized_layouts import awq, quantize_directory
from test_cuts import FAMILIES
from test_lora import CALM

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter import check_adapter, load_lora
from llm.checkpoint.adapter_digest import adapter_digest
from llm.checkpoint.adapter_places import adapted_places
from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterRef, GenerationRequest

PROMPTS = [tuple(range(3, 43)), tuple(range(50, 90)), tuple(range(90, 120))]


def create_engine(model: DecoderModel, max_adapters: int = 0) -> ContinuousBatchingEngine:
    config = EngineConfig(
        max_batch_size=4, max_tokens_per_step=32, num_pages=120, max_adapters=max_adapters,
        adapter_experts=True, attention_backend="reference",
    )  # fmt: skip
    return ContinuousBatchingEngine(model, config=config)


def logprobs_of(
    engine: ContinuousBatchingEngine, adapters: list[AdapterRef | None], prompts: list[tuple[int, ...]] = PROMPTS
) -> list[torch.Tensor]:
    """Of each prompt's tokens and of what is drawn: prefill in chunks, then decode."""
    requests = [
        GenerationRequest(
            prompt_token_ids=prompt, max_new_tokens=3, temperature=0.0, allowed_token_ids=(7,), logprobs=0,
            prompt_logprobs=0, adapter=adapter,
        )
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]  # fmt: skip
    results = engine.generate(requests, progress=False)
    assert {result.error for result in results} == {None}
    return [torch.tensor([each.logprob for each in (*r.prompt_logprobs, *r.logprobs)]) for r in results]


def write_adapters(model: DecoderModel, directory: Path, std: float = 0.08) -> list[AdapterRef | None]:
    """Two of different ranks, and none."""
    for rank in (3, 8):
        write_random_adapter(model.config, directory / str(rank), rank=rank, seed=rank, std=std, with_experts=True)
    paths = [directory / str(rank) for rank in (3, 8)]
    return [*(AdapterRef(name="x", path=str(path), digest=adapter_digest(path)) for path in paths), None]


@pytest.mark.parametrize("kind", FAMILIES)
def test_tokens_with_adapters_equal_merged_models(checkpoints, tmp_path, kind):
    """Within 1e-4 in float32; routers and experts have adapters, too."""
    directory = checkpoints(kind, **CALM)[0]
    model = load_decoder(directory, progress=False)
    adapters = write_adapters(model, tmp_path)
    engine = create_engine(model, max_adapters=2)
    found = logprobs_of(engine, adapters)
    engine.close()
    base = logprobs_of(create_engine(model), [None] * 3)
    for place, adapter in enumerate(adapters):
        expected = base[place]
        if adapter is not None:
            merged = load_decoder(directory, progress=False)
            load_lora(merged, adapter.path)
            merged.merge_lora()
            [expected] = logprobs_of(create_engine(merged), [None], [PROMPTS[place]])
            assert (found[place] - base[place]).abs().max() > 1e-2
        torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "mlp.gate"}),
        ("qwen3_5_moe", {"mlp.gate", "shared_expert_gate", "shared_expert.down_proj", "experts.11.gate_proj"}),
        ("mixtral", {"block_sparse_moe.gate", "experts.0.w1", "experts.0.w2", "experts.0.w3"}),
        ("gpt_oss", {"mlp.router", "q_proj"}),
    ],
)
def test_every_projection_is_among_them(checkpoints, kind, names):
    model = load_decoder(checkpoints(kind, **CALM)[0], progress=False)
    found = tuple(adapted_places(model))
    assert not [name for name in names if not any(each.endswith(f".{name}") for each in found)]


def test_an_adapter_works_on_top_of_weights_in_codes(checkpoints, tmp_path):
    """Merging into them is refused, but requests choose it: it equals the same adapter on the codes' numbers."""
    directory = tmp_path / "codes"
    quantize_directory(checkpoints("llama", **CALM)[0], directory, awq())
    model = load_decoder(directory, progress=False)
    adapters = write_adapters(model, tmp_path)
    with pytest.raises(ConfigError, match="is quantized"):
        load_lora(model, adapters[0].path)
    check_adapter(model.config, adapters[0].path, max_rank=8)
    engine = create_engine(model, max_adapters=2)
    found = logprobs_of(engine, adapters)
    engine.close()
    plain = load_decoder(checkpoints("llama", **CALM)[0], progress=False)
    for name, module in model.named_modules():
        if hasattr(module, "dequantized"):
            plain.get_submodule(name).weight.data = module.dequantized()
        elif name and list(module.parameters(recurse=False)):
            plain.get_submodule(name).load_state_dict(module.state_dict())
    load_lora(plain, adapters[0].path)
    expected = logprobs_of(create_engine(plain.merge_lora()), [None] * 3)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
