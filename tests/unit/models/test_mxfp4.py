"""gpt-oss's checkpoints as OpenAI publishes them: experts in MXFP4, which mean what transformers unpacks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cuts import check_cut
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from deployments.replica.model_memory import weight_bytes
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.config import EngineConfig
from llm.core.mxfp4 import block_codes
from llm.core.weight_groups import WeightGroups, dequantize, span_of
from llm.errors import CheckpointError, ConfigError
from llm.serving.checks import check_quantization
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

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


def unpacked(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What our layout of an expert's blocks means."""
    num_inputs = 32 * blocks.shape[-2]
    groups = WeightGroups(scales.t(), None, None, 32, span_of(num_inputs, 32, 4))
    return dequantize(groups.pack(block_codes(blocks)), groups)


def test_numbers_equal_transformers():
    torch.manual_seed(0)
    blocks, scales = random_blocks(3, 40, 96, (-120, 120))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    for expert in range(3):
        assert torch.equal(unpacked(blocks[expert], scales[expert]), expected[expert])


def test_the_largest_scale_is_not_a_number():
    """E8M0's code 255."""
    blocks, scales = torch.zeros(1, 2, 16, dtype=torch.uint8), torch.tensor([[127, 255]], dtype=torch.uint8)
    assert unpacked(blocks, scales).isnan().flatten().tolist() == [False] * 32 + [True] * 32


def write_in_mxfp4(source: Path, directory: Path, edit: Callable[..., None]) -> None:
    """Write a small random checkpoint again, with other random experts, in MXFP4."""
    torch.manual_seed(0)
    shutil.copytree(source, directory, dirs_exist_ok=True)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        blocks = random_blocks(num_experts, num_outputs, num_inputs, (-5, -2))
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks
    save_file(tensors, file)
    edit(directory / "config.json", quantization_config=QUANTIZATION)


@pytest.fixture
def directory(checkpoints, tmp_path, edit) -> Path:
    """The small random checkpoint in MXFP4."""
    write_in_mxfp4(checkpoints("gpt_oss")[0], tmp_path, edit)
    return tmp_path


@pytest.mark.parametrize("by_expert", [False, True])
def test_two_ranks_give_the_logits_of_the_whole_model(checkpoints, tmp_path, edit, by_expert):
    """Each takes its part of the blocks, or the blocks of its experts."""
    write_in_mxfp4(checkpoints("gpt_oss", intermediate_size=128)[0], tmp_path, edit)
    check_cut(tmp_path, 2, by_expert=by_expert)


@torch.inference_mode()
def test_logits_equal_transformers(checkpoints, directory):
    """With the weights that its own dequantisation gives."""
    theirs = checkpoints("gpt_oss")[1]
    tensors, meant = load_file(directory / "model.safetensors"), theirs.state_dict()
    for name in [name for name in meant if name.endswith(PROJECTIONS)]:
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    plain = type(theirs)(theirs.config).eval()
    plain.load_state_dict(meant)
    ours = load_decoder(directory, progress=False)
    ids = torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(ids), plain(ids, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_kernels_give_the_tokens_of_the_torch_operations(directory):
    """In float32, as they are in the files; prompts in chunks beside decodes."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 199, (n,), generator=generator).tolist()) for n in (2, 11)]
    requests = [GenerationRequest(prompt_token_ids=each, max_new_tokens=3, temperature=0) for each in prompts]
    tokens = []
    for backend in ("triton", "reference"):
        config = EngineConfig(attention_backend=backend, num_pages=32, max_batch_size=2, max_tokens_per_step=8)
        engine = ContinuousBatchingEngine(load_decoder(directory, progress=False), config=config)
        tokens.append([result.token_ids for result in engine.generate(requests, progress=False)])
    assert tokens[0] == tokens[1]


def test_check_knows_the_memory(checkpoints, directory):
    """Four bits a number, and eight for 32; nothing is unpacked, and nothing is to be said of it."""
    plain, checked = check_checkpoint(checkpoints("gpt_oss")[0]), check_checkpoint(directory)
    assert not checked.warnings
    tensors = load_file(directory / "model.safetensors").items()
    held = sum(tensor.nbytes for name, tensor in tensors if name.endswith(("_blocks", "_scales")))
    num_bytes = weight_bytes(plain.config, 2) - held // 17 * 32 * 2
    assert weight_bytes(checked.config, 2) == num_bytes + held
    with pytest.raises(ConfigError, match="fp8 is not what the checkpoint holds"):
        check_quantization(checked.config, EngineConfig(quantization="fp8"))


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
    with pytest.raises(ConfigError, match=r"down_proj has 100 inputs, which are not whole groups"):
        check_checkpoint(directory)
    edit(directory / "config.json", intermediate_size=96, quantization_config=None)
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=r"_(blocks|scales), which is quantized, but config\.json does not say so"
    ):
        check_checkpoint(directory)


def test_experts_that_are_not_to_be_converted_are_in_16_bits(checkpoints, tmp_path, edit):
    shutil.copytree(checkpoints("gpt_oss")[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", quantization_config={**QUANTIZATION, "modules_to_not_convert": ["mlp.experts"]})
    check_checkpoint(tmp_path)
    edit(tmp_path / "config.json", quantization_config=QUANTIZATION)
    with pytest.raises(CheckpointError, match=r"(gate_up|down)_proj, for which config\.json has no place"):
        check_checkpoint(tmp_path)
