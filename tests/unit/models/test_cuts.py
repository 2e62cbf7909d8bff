"""Models cut over ranks, all of which run in threads of this process, against the same model in one piece."""

from pathlib import Path

import pytest
import torch
from quantized_layouts import all_layouts, awq, gptq, quantize_directory
from test_lora import CALM, make_adapter
from thread_ranks import ThreadExchange, run_ranks

from llm.attention.dense import DenseContext
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import load_decoder
from llm.core.partition import Partition
from llm.errors import ConfigError
from llm.models import cuts
from llm.models.decoder import DecoderModel

LAYOUTS = {**dict(all_layouts()), "gptq 16": gptq(16)}


def prompt(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


def logits_of(model: DecoderModel) -> torch.Tensor:
    token_ids = prompt(190)
    positions = torch.arange(token_ids.shape[1])
    return model.logits(model.hidden_states(token_ids, positions, DenseContext()))


def check_cut(directory: Path, size: int, adapter: Path | None = None, *, by_expert: bool = False) -> None:
    """Rank 0 gets the whole model's logits, and no two of them hold the same weight of a product."""

    def load(partition: Partition) -> DecoderModel:
        model = load_decoder(directory, partition=partition, progress=False)
        if adapter is not None:
            load_lora(model, adapter)
            model.merge_lora()
        return model

    def run(partition: Partition, exchange: ThreadExchange) -> torch.Tensor:
        model = load(partition)
        model.exchange = exchange
        return logits_of(model)

    whole = load(Partition())
    with torch.inference_mode():
        expected = logits_of(whole)
    logits, *others = run_ranks(size, run, by_expert=by_expert)
    assert {each.shape for each in others} == {logits.shape}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


FAMILIES = [
    "deepseek_v2", "deepseek_v3", "gemma2", "gemma3", "gemma3_text_half", "glm4_moe", "glm4_moe_groups",
    "glm4_moe_lite", "gpt_oss", "llama", "llama_mha",
    "llama_mqa_biases", "ministral", "ministral3", "mistral", "mistral3_text_half", "mixtral", "phi3", "phi3_partial",
    "qwen2", "qwen2_tied", "qwen3", "qwen3_5", "qwen3_5_images", "qwen3_5_moe", "qwen3_moe", "qwen3_moe_dense",
    "qwen3_next",
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_ranks_give_the_logits_of_the_whole_model(checkpoints, kind):
    check_cut(checkpoints(kind)[0], 2)


@pytest.mark.parametrize(
    ("kind", "size"), [("llama", 4), ("llama_mqa_biases", 4), ("phi3", 4), ("qwen2_tied", 8), ("gemma2", 4)]
)
def test_more_ranks_than_heads_of_keys_hold_the_same_ones(checkpoints, kind, size):
    """Of 199 tokens the last rank has fewer; two heads of keys and values, or one, are held by several."""
    check_cut(checkpoints(kind)[0], size)


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_5_moe"])
def test_experts_cut_by_expert(checkpoints, kind):
    check_cut(checkpoints(kind)[0], 2, by_expert=True)


QUANTIZED = [
    "awq 16", "gptq 16", "gptq -1 symmetric", "gptq -1 act-order", "packed", "packed asymmetric", "fp8 by channel",
    "fp8 by tensor", "transformers' fp8 by block", "fp8 by block",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("llama", name) for name in QUANTIZED), ("phi3", "awq 16"), ("phi3", "packed"), ("phi3", "fp8 by block")],
)
def test_quantized_weights_are_cut_where_their_groups_end(checkpoints, tmp_path, kind, name):
    quantize_directory(checkpoints(kind, intermediate_size=128)[0], tmp_path, LAYOUTS[name])
    check_cut(tmp_path, 2)


@pytest.mark.parametrize(
    ("layout", "intermediate_size", "reason"),
    [
        (awq(32), 96, "not whole groups of group_size 32"),
        (gptq(16, has_order=True), 96, "whose groups cannot be cut"),
        (gptq(32, has_order=True), 64, "whose groups cannot be cut"),
    ],
    ids=["awq 32", "gptq 16 act-order", "gptq act-order, one group a rank"],
)
def test_groups_that_cannot_be_cut_are_refused(checkpoints, tmp_path, layout, intermediate_size, reason):
    quantize_directory(checkpoints("llama", intermediate_size=intermediate_size)[0], tmp_path, layout)
    with pytest.raises(ConfigError, match=reason):
        load_decoder(tmp_path, partition=Partition(1, 2), progress=False)


@pytest.mark.parametrize(
    ("kind", "options"), [("qwen3", {}), ("phi3", {"target_modules": "all-linear"}), ("qwen3_next", {"r": 3})]
)
def test_adapters_are_cut_like_what_they_are_on(checkpoints, tmp_path, kind, options):
    if kind == "qwen3_next":
        options = {**options, "target_modules": ["in_proj_qkvz", "in_proj_ba", "out_proj", "o_proj"]}
    make_adapter(checkpoints, tmp_path, kind, **options)
    check_cut(checkpoints(kind, **CALM)[0], 2, tmp_path)


def test_a_rank_reads_and_holds_its_part_alone(checkpoints):
    """Of what is cut every rank has a share; the shares of two make the whole, and norms are held twice."""
    directory = checkpoints("qwen3_moe")[0]
    whole = dict(load_decoder(directory, progress=False).named_parameters())
    for by_expert in (False, True):
        parts = [
            dict(load_decoder(directory, partition=Partition(rank, 2, by_expert), progress=False).named_parameters())
            for rank in (0, 1)
        ]
        for name, parameter in whole.items():
            shares = [part[name].numel() / parameter.numel() for part in parts]
            is_whole = name.endswith(("norm.weight", "router.weight"))
            assert shares == ([1, 1] if is_whole else pytest.approx([0.5, 0.5], abs=0.01)), name


@pytest.mark.parametrize(
    ("shape", "size", "reason"),
    [
        ({"num_heads": 6, "hidden_size": 48}, 4, "does not divide the model's 6 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 3, "hidden_size": 48}, 2, "no multiple of the model's 3 key/value heads"),
        ({"intermediate_size": 66}, 4, "does not divide the model's 66 numbers between"),
    ],
)
def test_shapes_that_cannot_be_cut_are_refused(shape, size, reason):
    with pytest.raises(ConfigError, match=reason):
        DecoderModel(device="meta", partition=Partition(0, size), **shape)


def test_a_family_that_nobody_knows_how_to_cut_is_refused(monkeypatch):
    """By the name of the first of its modules that has no rule."""
    monkeypatch.delitem(cuts._RULES, "down_proj")
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be cut over several GPUs"):
        DecoderModel(device="meta", partition=Partition(0, 2))
