"""Loading weights: single and sharded files, and a clear line for everything that can be wrong with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.checkpoint.loading import load_checkpoint, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.config import ModelConfig
from llm.errors import CheckpointError, LLMError
from llm.models.decoder import DecoderModel
from llm.models.registry import destinations


@pytest.fixture
def single(checkpoints, tmp_path) -> Path:
    """A Qwen3 checkpoint in one file, to be damaged."""
    return Path(shutil.copytree(checkpoints("qwen3")[0], tmp_path / "single"))


@pytest.fixture
def sharded(checkpoints, tmp_path) -> Path:
    """The same in several files."""
    checkpoints("qwen3")[1].save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a file; None takes one out."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(directory: Path) -> str:
    """The message with which loading fails: one line."""
    with pytest.raises(CheckpointError) as info:
        load_decoder(directory, progress=False)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_shards_hold_what_one_file_holds(single, sharded):
    one, many = load_decoder(single, progress=False), load_decoder(sharded, progress=False)
    assert one.state_dict().keys() == many.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), many.state_dict().values(), strict=True))


def test_shards_without_an_index_load_too(sharded, single):
    (sharded / "model.safetensors.index.json").unlink()
    ids = [[1, 2, 3]]
    ours, other = load_decoder(sharded, progress=False), load_decoder(single, progress=False)
    assert torch.equal(ours(torch.tensor(ids)), other(torch.tensor(ids)))


def test_a_loaded_model_is_ready_for_inference(single, capsys):
    model = load_decoder(single, progress=True)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("inference", [True, False])
def test_loading_inside_and_outside_inference_mode(single, inference):
    with torch.inference_mode(inference):
        load_decoder(single, progress=False)
    trainable = DecoderModel.from_config(load_model_config(single))
    load_checkpoint(trainable, single, progress=False)
    assert all(parameter.requires_grad for parameter in trainable.parameters())


@pytest.mark.parametrize(
    "shape",
    [
        {}, {"num_kv_heads": 2, "qk_norm": True}, {"tie_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {
            "architecture": "Qwen3MoeForCausalLM", "num_experts": 3, "num_experts_per_token": 1, "expert_size": 8,
            "dense_layers": (1,),
        },
        {"architecture": "MixtralForCausalLM", "num_experts": 3, "expert_size": 8},
    ],
)  # fmt: skip
def test_the_map_covers_every_row_of_every_parameter_once(shape):
    config = ModelConfig(hidden_size=32, num_heads=4, num_layers=2, vocab_size=11, **shape)
    model = DecoderModel.from_config(config)
    counts = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for place in destinations(config).values():
        for leaf in ("weight", "bias"):
            if f"{place.module}.{leaf}" in counts:
                place.part_of(counts[f"{place.module}.{leaf}"]).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())


def test_old_rotary_buffers_and_a_tied_head_are_passed_over(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("qwen2_tied")[0], tmp_path / "tied"))
    tensors = load_file(directory / "model.safetensors")
    change_tensors(
        directory / "model.safetensors",
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        },
    )
    load_decoder(directory, progress=False)


def test_a_missing_shard(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.unlink()
    assert refusal(sharded) == f"{path} is missing; download the checkpoint again"


def test_a_shard_cut_short(sharded):
    path = sorted(sharded.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(sharded).startswith(f"{path} is damaged or cut short")


def test_an_empty_file(single):
    path = single / "model.safetensors"
    path.write_bytes(b"")
    assert refusal(single).startswith(f"{path} is damaged or cut short")


def test_a_file_that_lacks_what_its_index_lists(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    path = sharded / index["weight_map"]["model.norm.weight"]
    change_tensors(path, model__norm__weight=None)
    assert refusal(sharded).startswith(f"{path} lacks model.norm.weight, which its index lists")


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}']
)
def test_a_bad_index(sharded, content):
    path = sharded / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(LLMError, match=r"model\.safetensors\.index\.json"):
        load_decoder(sharded, progress=False)


def test_missing_tensors_are_named(single):
    change_tensors(
        single / "model.safetensors", **{f"model.layers.{i}.self_attn.q_norm.weight": None for i in range(3)}
    )
    change_tensors(single / "model.safetensors", lm_head__weight=None)
    assert refusal(single) == (
        f"{single} lacks lm_head.weight, model.layers.0.self_attn.q_norm.weight, "
        "model.layers.1.self_attn.q_norm.weight and 1 more; download the checkpoint again"
    )


def test_unexpected_tensors_are_named(single):
    change_tensors(single / "model.safetensors", **{"model.layers.0.self_attn.q_proj.bias": torch.ones(8 * 24)})
    assert "holds model.layers.0.self_attn.q_proj.bias, which config.json gives no place" in refusal(single)


def test_a_wrong_shape(single, edit):
    edit(single / "config.json", vocab_size=200)
    message = refusal(single)
    assert "has shape (199, 64), config.json asks for (200, 64)" in message
    assert message.startswith(str(single / "model.safetensors"))


def test_weights_that_are_no_floats(single):
    change_tensors(single / "model.safetensors", model__norm__weight=torch.ones(64, dtype=torch.int8))
    assert "model.norm.weight has type I8; only float32" in refusal(single)


def test_a_tensor_in_two_files(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    change_tensors(second, **{name: tensor})
    assert f"{second} and {first.name} both hold {name}" in refusal(sharded)


def test_pickles_are_refused(single):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    message = refusal(single)
    assert message.startswith(str(single / "pytorch_model.bin"))
    assert "convert the checkpoint to safetensors" in message


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    assert refusal(single) == f"{single} holds no .safetensors file; download the checkpoint again"
