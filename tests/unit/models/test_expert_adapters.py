"""Adapters on routers and experts as PEFT saves them: ours = PEFT's, and what does not fit is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import CALM, IDS, edit_adapter, make_adapter

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter import check_adapter, load_lora
from llm.checkpoint.adapter_slots import AdapterPacker
from llm.checkpoint.loading import load_decoder
from llm.errors import CheckpointError, ConfigError
from llm.models.decoder import DecoderModel

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTED = {"target_modules": ["q_proj"], "target_parameters": [*STACKS, "gate.weight"]}


def check_equals_peft(checkpoints: Any, directory: Path, kind: str, **changes: Any) -> None:
    """States carry what each token rounds to the next ones, so families with them come less close."""
    theirs = make_adapter(checkpoints, directory, kind, **changes)
    ours = load_decoder(checkpoints(kind, **CALM)[0], progress=False)
    before = ours(IDS)
    load_lora(ours, directory)
    after = ours.merge_lora()(IDS)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(
        after, theirs(IDS).logits, atol=1e-3 if kind in ("qwen3_5_moe", "qwen3_next") else 1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3_moe", ROUTED),
        ("mixtral", {**ROUTED, "use_rslora": True}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": [*STACKS, "router.weight"]}),
        ("deepseek_v2", {**ROUTED, "target_modules": ["kv_b_proj"]}),
        ("deepseek_v3", {**ROUTED, "target_modules": ["kv_b_proj"]}),
        ("glm4_moe", ROUTED),
        ("qwen3_5_moe", {"target_modules": ["shared_expert_gate"], "target_parameters": STACKS}),
        ("qwen3_next", {"target_modules": ["shared_expert.down_proj"], "target_parameters": STACKS}),
        ("gpt_oss", {"target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"]}),
        ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        (
            "qwen3_moe",
            {
                "target_modules": [],
                "target_parameters": [*STACKS, "gate.weight"],
                "rank_pattern": {"experts.gate_up_proj": 6, "gate.weight": 2},
                "alpha_pattern": {"1.mlp.experts.down_proj": 20},
            },
        ),
    ],
)
@torch.inference_mode()
def test_projections_of_all_experts_equal_peft(checkpoints, tmp_path, kind, changes):
    """`target_parameters`: of one parameter or several, the router's weight too; of patterns for each."""
    check_equals_peft(checkpoints, tmp_path, kind, **changes)


def split_by_expert(directory: Path, num_experts: int, names: tuple[str, str, str]) -> None:
    """Rewrite an adapter on all experts of every layer as one on each expert, as files of transformers 4 have them."""
    path = directory / "adapter_model.safetensors"
    found, gate, up, down = load_file(path), *names
    split = {}
    for name, tensor in found.items():
        if ".experts." not in name:
            split[name] = tensor
            continue
        block, part, is_gate_up = name.split(".experts.")[0], name.split(".lora_")[1][0], "base_layer" in name
        if part == "A":
            each = tensor.unflatten(0, (num_experts, -1))
        else:
            each = tensor.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        for expert, factor in enumerate(each):
            both = factor.chunk(2) if part == "B" and is_gate_up else (factor, factor)
            for target, own in zip((gate, up), both, strict=True) if is_gate_up else ((down, factor),):
                split[f"{block}.experts.{expert}.{target}.lora_{part}.weight"] = own.contiguous()
    save_file({name: tensor.clone() for name, tensor in split.items()}, path)


@pytest.mark.parametrize(
    ("kind", "names"), [("qwen3_moe", ("gate_proj", "up_proj", "down_proj")), ("mixtral", ("w1", "w3", "w2"))]
)
@torch.inference_mode()
def test_the_same_factors_one_by_one(checkpoints, tmp_path, kind, names):
    """Names of each expert's modules, and Mixtral's block by its older name."""
    theirs = make_adapter(checkpoints, tmp_path, kind, target_modules=[], target_parameters=STACKS)
    split_by_expert(tmp_path, theirs.config.num_local_experts, names)
    path = tmp_path / "adapter_model.safetensors"
    if kind == "mixtral":
        save_file({name.replace(".mlp.", ".block_sparse_moe."): each for name, each in load_file(path).items()}, path)
    ours = load_decoder(checkpoints(kind, **CALM)[0], progress=False)
    load_lora(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_versions_of_peft_that_read_outputs(checkpoints, tmp_path):
    """Some take the first dimension of a parameter for its inputs, whatever it is."""
    model = copy.deepcopy(checkpoints("qwen3_moe", **CALM)[1])
    for layer in model.model.layers:
        type(layer.mlp.experts).is_transposed = True
    try:
        torch.manual_seed(1)
        options = {"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": STACKS}
        theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        theirs.save_pretrained(str(tmp_path))
        merged = theirs.merge_and_unload()
    finally:
        type(model.model.layers[0].mlp.experts).is_transposed = False
    ours = load_decoder(checkpoints("qwen3_moe", **CALM)[0], progress=False)
    load_lora(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), merged(IDS).logits, atol=1e-4, rtol=0)


def test_merging_into_a_model_whose_weights_may_be_trained(checkpoints, tmp_path):
    """As a model with random weights is: what is added is no part of a graph of gradients."""
    config = load_decoder(checkpoints("gpt_oss")[0], progress=False).config
    model = DecoderModel.from_config(config)
    write_random_adapter(config, tmp_path, rank=2, with_experts=True)
    before = copy.deepcopy(model)
    load_lora(model, tmp_path)
    for name in ("router", "gate_up_proj", "down_proj"):
        ours, theirs = (each.get_submodule(f"layers.0.experts.{name}").weight for each in (model, before))
        assert ours.is_leaf
        assert not torch.equal(ours, theirs)


def test_what_does_not_fit_is_refused(checkpoints, tmp_path):
    make_adapter(checkpoints, tmp_path, "qwen3_moe", target_modules=[], target_parameters=STACKS)
    config = load_decoder(checkpoints("qwen3_moe", **CALM)[0], progress=False).config
    check_adapter(config, tmp_path, max_rank=4)
    with pytest.raises(ConfigError, match=r"experts.*adapter_experts: true"):
        check_adapter(config, tmp_path, max_rank=4, with_experts=False)
    with pytest.raises(ConfigError, match=r"rank 4, .* room for max_adapter_rank 3"):
        check_adapter(config, tmp_path, max_rank=3)
    edit_adapter(tmp_path, r=5)
    with pytest.raises(CheckpointError, match=r"12 experts of 64 inputs and 56 numbers .* says rank 5"):
        check_adapter(config, tmp_path)
    other = config.model_copy(update={"num_experts": 6})
    edit_adapter(tmp_path, r=4)
    with pytest.raises(CheckpointError, match="was the adapter trained on this model"):
        check_adapter(other, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "lora_A" in name}, path)
    with pytest.raises(CheckpointError, match=r"experts.* has lora_A"):
        check_adapter(config, tmp_path)


def test_slots_have_room_for_experts_only_if_asked(checkpoints):
    """Three projections of 12 experts, and a router, in each of 3 layers."""
    model = DecoderModel.from_config(load_decoder(checkpoints("qwen3_moe")[0], progress=False).config, device="meta")
    small, large = (AdapterPacker(model, 16, with_experts=each).layout.size for each in (False, True))
    experts = 12 * ((2 * 16 * 64 + 112 * 16) + (16 * 56 + 64 * 16))
    assert 0 <= large - small - 3 * (experts + 16 * 64 + 12 * 16) < 3 * 6 * 64
