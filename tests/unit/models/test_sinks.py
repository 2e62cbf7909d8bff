"""Attention as gpt-oss's, with sinks, windows in every other layer, YaRN and biases, equals transformers'.

Its experts are made to give nothing, and so is the feed-forward of a Llama whose attention is of that kind.
"""

import pytest
import torch
from test_parity import greedy_of_ours, prompt
from transformers import GptOssConfig, GptOssForCausalLM

from llm.checkpoint.weight_slots import find_slots
from llm.config import RopeScaling
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

YARN = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs() -> GptOssForCausalLM:
    config = GptOssConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2, sliding_window=17,
        num_local_experts=4, num_experts_per_tok=2, rope_parameters={**YARN, "rope_theta": 1500.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts.down_proj" in name:
                parameter.zero_()
            elif name.endswith(("bias", "sinks")):
                parameter.normal_()
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
@torch.no_grad()
def ours(theirs) -> DecoderModel:
    model = DecoderModel(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=16,
        max_seq_len=512, window_size=17, window_layers=(0, 2), attention_bias=True, attention_output_bias=True,
        attention_sinks=True, norm_offset=0.0, rms_norm_eps=1e-5, rope_theta=1500.0, rope_scaling=RopeScaling(**YARN),
    )  # fmt: skip
    state = theirs.state_dict()
    for name, slot in find_slots(model).items():
        if "mlp" in name:
            slot.target.zero_()
        else:
            slot.target.copy_(state[name])
    return model.eval()


@pytest.mark.parametrize("length", [1, 7, 70, 150])
@torch.inference_mode()
def test_logits_equal(ours, theirs, length):
    ids = prompt(length, batch_size=2)
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_greedy_tokens_of_caches_and_engine_equal(ours, theirs):
    """A prompt longer than every window, in chunks, beside a short one."""
    expected = []
    for length in (90, 5):
        ids, past, tokens = prompt(length), None, []
        for _ in range(64):
            output = theirs(ids, past_key_values=past, use_cache=True)
            ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            tokens.append(int(ids))
        assert len(set(tokens)) > 8
        assert greedy_of_ours(ours, prompt(length), ours.make_kv_caches(1)) == tokens
        expected.append(tokens)
    requests = [
        GenerationRequest(
            prompt_token_ids=tuple(prompt(length)[0].tolist()), max_new_tokens=64, temperature=0, ignore_eos=True
        )
        for length in (90, 5)
    ]
    engine = ContinuousBatchingEngine(ours, max_batch_size=2, max_seq_len=256)
    assert [list(result.token_ids) for result in engine.generate(requests, progress=False)] == expected
