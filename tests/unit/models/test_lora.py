"""LoRA adapters: ours = PEFT's, merged = unmerged, and what cannot be done is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import load_decoder
from llm.errors import CheckpointError, ConfigError, LLMError
from llm.models.lora import LoRALinear, merge_lora

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Weights as small as real ones: wild ones would magnify the rounding of float32 past 1e-5.
CALM = {"initializer_range": 0.06}
IDS = torch.arange(3, 40).unsqueeze(0)


def make_adapter(checkpoints: Any, directory: Path, kind: str = "qwen3", **changes: Any) -> PeftModel:
    """A random adapter saved by PEFT; returns PEFT's model with it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(checkpoints(kind, **CALM)[1]), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(directory))
    return model.eval()


def edit_adapter(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {}),
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2_tied", {"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}),
        (
            "llama_mqa_biases",
            {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 1}},
        ),
        ("mistral", {"layers_to_transform": [1]}),
        ("gpt_oss", {"target_modules": ["q_proj", "o_proj"]}),
        ("llama_mha", {"target_modules": "all-linear"}),
    ],
)
@torch.inference_mode()
def test_unmerged_equals_peft_and_merged_equals_unmerged(checkpoints, tmp_path, kind, changes):
    theirs = make_adapter(checkpoints, tmp_path, kind, **changes)
    ours = load_decoder(checkpoints(kind, **CALM)[0], progress=False)
    plain = ours(IDS)
    load_lora(ours, tmp_path)
    unmerged = ours(IDS)
    torch.testing.assert_close(unmerged, theirs(IDS).logits, atol=1e-4, rtol=0)
    assert (unmerged - plain).abs().max() > 0.01
    ours.merge_lora()
    merged = ours(IDS)
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in ours.modules())
    merge_lora(ours)
    assert torch.equal(ours(IDS), merged)


@torch.inference_mode()
def test_an_adapter_on_projections_whose_rows_change_places(checkpoints, tmp_path):
    theirs = make_adapter(checkpoints, tmp_path, "qwen3_next", target_modules=["in_proj_qkvz", "in_proj_ba"])
    ours = load_decoder(checkpoints("qwen3_next", **CALM)[0], progress=False)
    before = ours(IDS)
    load_lora(ours, tmp_path)
    after = ours(IDS)
    assert (after - before).abs().max() > 0.1
    # States carry what each token rounds to the next ones: some processors leave 2e-4 at the last.
    torch.testing.assert_close(after, theirs(IDS).logits, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_an_adapter_of_a_model_with_other_names_in_front(checkpoints, tmp_path):
    """Trained beside another modality, or on the model without its head."""
    make_adapter(checkpoints, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    factors = load_file(path)
    plain, renamed = (load_decoder(checkpoints("qwen3", **CALM)[0], progress=False) for _ in range(2))
    load_lora(plain, tmp_path)
    save_file({name.replace("model.layers", "model.language_model.layers"): factors[name] for name in factors}, path)
    load_lora(renamed, tmp_path)
    assert torch.equal(plain(IDS), renamed(IDS))


@torch.inference_mode()
def test_merging_without_an_adapter_changes_nothing(checkpoints):
    model = load_decoder(checkpoints("llama", **CALM)[0], progress=False)
    before = model(IDS)
    assert torch.equal(model.merge_lora()(IDS), before)


@torch.inference_mode()
def test_two_adapters_add_up(checkpoints, tmp_path):
    """Loaded together or merged one after the other, the weights are the same."""
    for name, rank in (("a", 2), ("b", 5)):
        make_adapter(checkpoints, tmp_path / name, r=rank)
    together, one_by_one = (load_decoder(checkpoints("qwen3", **CALM)[0], progress=False) for _ in range(2))
    for name in ("a", "b"):
        load_lora(together, tmp_path / name)
        load_lora(one_by_one, tmp_path / name)
        one_by_one.merge_lora()
    torch.testing.assert_close(together.merge_lora()(IDS), one_by_one(IDS), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_merging_in_half_precision_rounds_once(checkpoints, tmp_path):
    """bfloat16 weights plus the update, computed in float32, rounded at the end."""
    make_adapter(checkpoints, tmp_path, target_modules=["o_proj"])
    model = load_decoder(checkpoints("qwen3", **CALM)[0], dtype=torch.bfloat16, progress=False)
    before = model.layers[0].o_proj.weight.float()
    load_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    factor_a, factor_b = (tensors[name.format(part)].bfloat16().float() for part in "AB")
    model.merge_lora()
    expected = (before + factor_b @ factor_a * 1.5).bfloat16()
    assert torch.equal(model.layers[0].o_proj.weight, expected)


def test_an_adapter_moves_with_its_model(checkpoints, tmp_path):
    make_adapter(checkpoints, tmp_path)
    model = load_decoder(checkpoints("qwen3", **CALM)[0], progress=False)
    load_lora(model, tmp_path)
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"init_lora_weights": "pissa"}, "also change the model's weights"),
        ({"r": None}, "adapter_config.json: r: "),
        ({"alpha_pattern": {"q_proj": "x"}}, "adapter_config.json: alpha_pattern.q_proj: "),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"r": 8}, "lora_A and lora_B of shapes"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(checkpoints, tmp_path, changes, reason):
    make_adapter(checkpoints, tmp_path)
    edit_adapter(tmp_path, **changes)
    model = load_decoder(checkpoints("qwen3", **CALM)[0], progress=False)
    with pytest.raises(LLMError, match=reason) as info:
        load_lora(model, tmp_path)
    assert str(info.value).startswith(str(tmp_path))
    assert "\n" not in str(info.value)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_adapters_on_other_modules_are_refused(checkpoints, tmp_path):
    make_adapter(checkpoints, tmp_path, target_modules=["lm_head", "q_proj"])
    model = load_decoder(checkpoints("qwen3", **CALM)[0], progress=False)
    with pytest.raises(CheckpointError, match="lm_head"):
        load_lora(model, tmp_path)


def test_an_adapter_for_another_model_is_refused(checkpoints, tmp_path):
    make_adapter(checkpoints, tmp_path, kind="llama_mha")
    model = load_decoder(checkpoints("llama", **CALM)[0], progress=False)
    with pytest.raises(CheckpointError, match="was the adapter trained on this model"):
        load_lora(model, tmp_path)


def test_damaged_adapters(checkpoints, tmp_path):
    make_adapter(checkpoints, tmp_path)
    model = load_decoder(checkpoints("qwen3", **CALM)[0], progress=False)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match="only one of lora_A and lora_B"):
        load_lora(model, tmp_path)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"holds base_model\.model\.lm_head\.weight, which is not a LoRA factor"):
        load_lora(model, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_lora(model, tmp_path)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_lora(model, tmp_path)
    path.with_suffix(".bin").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_lora(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        load_lora(model, tmp_path)
