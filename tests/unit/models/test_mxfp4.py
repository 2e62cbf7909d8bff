"""gpt-oss's checkpoints as OpenAI publishes them: experts in MXFP4, unpacked as transformers unpacks them."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from deployments.replica.model_memory import weight_bytes
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.config import EngineConfig
from llm.core.mxfp4 import unpack_mxfp4
from llm.errors import CheckpointError, ConfigError
from llm.serving.checks import check_quantization

PROJECTIONS = ("gate_up_proj", "down_proj")
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def random_blocks(num_experts: int, num_outputs: int, num_inputs: int, powers: tuple[int, int]) -> list[torch.Tensor]:
    """Blocks, with every code, and scales of so many powers of two."""
    shape = num_experts, num_outputs, num_inputs // 32
    scales = torch.randint(127 + powers[0], 128 + powers[1], shape, dtype=torch.uint8)
    return [torch.randint(256, (*shape, 16), dtype=torch.uint8), scales]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_equal_transformers(dtype):
    torch.manual_seed(0)
    blocks, scales = random_blocks(3, 40, 96, (-120, 120))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(unpack_mxfp4(blocks, scales, dtype), expected)


def test_the_largest_scale_is_not_a_number():
    """E8M0's code 255."""
    blocks, scales = torch.zeros(1, 1, 2, 16, dtype=torch.uint8), torch.tensor([[[127, 255]]], dtype=torch.uint8)
    assert unpack_mxfp4(blocks, scales, torch.float32).isnan().flatten().tolist() == [False] * 32 + [True] * 32


@pytest.fixture
def directory(checkpoints, tmp_path, edit) -> Path:
    """The small random checkpoint with random experts in MXFP4."""
    torch.manual_seed(0)
    shutil.copytree(checkpoints("gpt_oss")[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        blocks = random_blocks(num_experts, num_outputs, num_inputs, (-5, -2))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks
    save_file(tensors, file)
    edit(tmp_path / "config.json", quantization_config=QUANTIZATION)
    return tmp_path


@torch.inference_mode()
def test_logits_equal_transformers(checkpoints, directory, caplog):
    """With the weights that its own dequantisation gives; a line says that they take more memory than the file."""
    theirs = checkpoints("gpt_oss")[1]
    tensors, meant = load_file(directory / "model.safetensors"), theirs.state_dict()
    for name in [name for name in meant if name.endswith(PROJECTIONS)]:
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain = type(theirs)(theirs.config).eval()
    plain.load_state_dict(meant)
    with caplog.at_level(logging.WARNING):
        ours = load_decoder(directory, progress=False)
    assert "experts in 4 bits (MXFP4) are unpacked" in caplog.text
    ids = torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), plain(ids, use_cache=False).logits, atol=1e-4, rtol=0)


def test_check_knows_the_memory_of_unpacked_experts(checkpoints, directory):
    in_16_bits = check_checkpoint(checkpoints("gpt_oss")[0])
    checked = check_checkpoint(directory)
    assert not in_16_bits.warnings
    assert [str(directory) in warning and "16 bits" in warning for warning in checked.warnings] == [True]
    assert weight_bytes(checked.config, 2) == weight_bytes(in_16_bits.config, 2)
    check_quantization(checked.config, EngineConfig(quantization="fp8"))  # unpacked weights can be rounded


def test_files_that_do_not_fit_are_refused(directory, edit):
    """Numbers that are no whole blocks, scales that are missing or misshapen, blocks that config.json does not tell."""
    file = directory / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.experts.down_proj_scales"
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"down_proj_scales has shape \(6, 5, 3\), config\.json asks for"):
        check_checkpoint(directory)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        check_checkpoint(directory)
    edit(directory / "config.json", intermediate_size=100)
    with pytest.raises(ConfigError, match=r"quantized experts .*down_proj"):
        check_checkpoint(directory)
    edit(directory / "config.json", intermediate_size=96, quantization_config=None)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"_(blocks|scales), which config\.json gives no place"):
        check_checkpoint(directory)


def test_experts_that_are_not_to_be_converted_are_in_16_bits(checkpoints, tmp_path, edit):
    shutil.copytree(checkpoints("gpt_oss")[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", quantization_config={**QUANTIZATION, "modules_to_not_convert": ["mlp.experts"]})
    check_checkpoint(tmp_path)
    edit(tmp_path / "config.json", quantization_config=QUANTIZATION)
    with pytest.raises(CheckpointError, match=r"(gate_up|down)_proj, which config\.json gives no place"):
        check_checkpoint(tmp_path)
