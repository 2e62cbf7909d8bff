"""Loading weights: single and sharded files, and a clear line for everything that can be wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm.checkpoint.loading import check_checkpoint, load_checkpoint, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.config import ModelConfig
from llm.errors import CheckpointError, LLMError
from llm.models.decoder import DecoderModel
from llm.models.registry import destinations, parts_of_modules


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
        {
            "architecture": "Glm4MoeForCausalLM", "num_experts": 4, "expert_size": 8, "shared_expert_size": 16,
            "dense_layers": (0,), "routing": {"uses_sigmoid": True},
        },
        {"architecture": "GptOssForCausalLM", "num_experts": 3, "expert_size": 8, "expert_bias": True},
    ],
)  # fmt: skip
def test_the_map_covers_every_row_of_every_parameter_once(shape):
    """Experts one by one, where a family has names for them; beside that a checkpoint may hold them in one tensor."""
    config = ModelConfig(hidden_size=32, num_heads=4, num_layers=2, vocab_size=11, **shape)
    model = DecoderModel.from_config(config)
    counts = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for place in (destinations(config)[name] for names in parts_of_modules(config).values() for name in names):
        for leaf in ("weight", "bias", "e_score_correction_bias"):
            if f"{place.module}.{leaf}" in counts:
                place.part_of(counts[f"{place.module}.{leaf}"]).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())


def test_layers_that_guess_tokens_are_left_alone_where_a_family_has_them(checkpoints, tmp_path):
    """A line says so; in a family without them, a layer behind the last is none of the model's."""
    for kind in ("glm4_moe", "llama"):
        directory = tmp_path / kind
        shutil.copytree(checkpoints(kind)[0], directory)
        path = directory / "model.safetensors"
        tensors = {**load_file(path), "model.layers.3.eh_proj.weight": torch.zeros(64, 128)}
        save_file(tensors, path, metadata={"format": "pt"})
    [note] = check_checkpoint(tmp_path / "glm4_moe").warnings
    assert note.endswith("Glm4MoeForCausalLM is served without multi-token prediction (MTP)")
    load_decoder(tmp_path / "glm4_moe", progress=False)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight, for which config\.json has no place"
    ):
        check_checkpoint(tmp_path / "llama")


NUM_EXPERTS = 12
"""Of each layer of the checkpoints with stacks."""


def stack_experts(path: Path, names: tuple[str, ...]) -> None:
    """Put these projections of a layer's experts into one tensor each, as released files of Qwen3.5 have them."""
    tensors = load_file(path)
    blocks = {name.split(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}
    for block in blocks:
        for name in names:
            parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
            stack = [
                torch.cat([tensors.pop(f"{block}.{i}.{part}.weight") for part in parts]) for i in range(NUM_EXPERTS)
            ]
            tensors[f"{block}.{name}"] = torch.stack(stack)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["qwen3_5_moe_images", "qwen3_next_dense"])
def test_experts_one_by_one_or_in_stacks(checkpoints, tmp_path, kind):
    directory = Path(shutil.copytree(checkpoints(kind)[0], tmp_path / kind))
    ids = torch.arange(3, 20).unsqueeze(0)
    expected = load_decoder(directory, progress=False)(ids)
    for names in (("down_proj",), ("gate_up_proj",)):  # first in part, then all
        stack_experts(directory / "model.safetensors", names)
        assert torch.equal(load_decoder(directory, progress=False)(ids), expected)


def test_experts_that_are_missing_or_there_twice(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("qwen3_5_moe")[0], tmp_path / "twice"))
    path = directory / "model.safetensors"
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    whole = load_file(path)
    change_tensors(path, **{name: None})
    assert f"lacks {name};" in refusal(directory)
    save_file(whole, path)
    stack_experts(path, ("down_proj",))
    change_tensors(path, **{name: whole[name]})
    message = refusal(directory)
    assert f"holds both model.layers.1.mlp.experts.down_proj and {name};" in message


def rename_tensors(path: Path, rename: Callable[[str], str]) -> None:
    """Give the tensors of a file other names."""
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def assert_same(one: DecoderModel, other: DecoderModel) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("", "lm_head."),
        ("transformer.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("module.model.", "module.lm_head."),
        ("_orig_mod.model.", "_orig_mod.lm_head."),
    ],
)
def test_names_with_anything_in_front(checkpoints, single, body, head):
    """Saved without the head's class, from a wrapper, or beside another modality's layers."""
    plain = load_decoder(checkpoints("qwen3")[0], progress=False)
    path = single / "model.safetensors"
    rename_tensors(path, lambda name: name.replace("model.", body, 1).replace("lm_head.", head))
    assert_same(load_decoder(single, progress=False), plain)
    change_tensors(path, **{"vision_tower.encoder.layers.0.mlp.up_proj.weight": torch.ones(2, 2)})
    assert "holds vision_tower.encoder.layers.0.mlp.up_proj.weight, for which config.json has no place" in refusal(
        single
    )


@pytest.mark.parametrize("word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_with_a_wrapper_in_the_middle(checkpoints, single, word):
    rename_tensors(
        single / "model.safetensors", lambda name: f"{word}.{name}".replace("layers.1.", f"layers.1.{word}.")
    )
    assert_same(load_decoder(single, progress=False), load_decoder(checkpoints("qwen3")[0], progress=False))


def test_names_with_anything_in_front_in_shards(checkpoints, sharded):
    plain = load_decoder(checkpoints("qwen3")[0], progress=False)
    for path in sharded.glob("*.safetensors"):
        rename_tensors(path, lambda name: name.removeprefix("model."))
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.', '"'))
    assert_same(load_decoder(sharded, progress=False), plain)


def test_one_whole_file_wins_over_an_index(single, sharded):
    """As in transformers: the index is of shards that are gone, or of an older version of the model."""
    plain = load_decoder(single, progress=False)
    for path in sharded.glob("*.safetensors"):
        shutil.copy(path, single)
    shutil.copy(sharded / "model.safetensors.index.json", single)
    for path in single.glob("model-*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert_same(load_decoder(single, progress=False), plain)
    for path in single.glob("model-*.safetensors"):
        path.unlink()
    assert_same(load_decoder(single, progress=False), plain)


def test_shards_whose_names_are_newer_than_their_index(single, sharded):
    plain = load_decoder(single, progress=False)
    for path in sharded.glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("model-", "weights-")))
    assert_same(load_decoder(sharded, progress=False), plain)


def test_a_part_that_is_named_like_the_whole_is_no_checkpoint(single, sharded):
    """The index wins where `model.safetensors` does not hold everything."""
    plain = load_decoder(single, progress=False)
    save_file({"model.norm.weight": torch.ones(64)}, sharded / "model.safetensors")
    assert_same(load_decoder(sharded, progress=False), plain)


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached", "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.masked_bias", "model.embeddings.position_ids",
    "model.layers.0.self_attn.core_attention._extra_state", "v_head.summary.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_what_no_model_needs_is_passed_over(checkpoints, single, name):
    plain = load_decoder(checkpoints("qwen3")[0], progress=False)
    change_tensors(single / "model.safetensors", **{name: torch.ones(4)})
    assert_same(load_decoder(single, progress=False), plain)


@pytest.fixture
def tied(checkpoints, tmp_path) -> Path:
    """A checkpoint whose output head is its embeddings, to be changed."""
    return Path(shutil.copytree(checkpoints("qwen2_tied")[0], tmp_path / "tied"))


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_tied_head_may_stand_beside_the_embeddings_or_in_their_place(checkpoints, tied, is_alone):
    plain = load_decoder(checkpoints("qwen2_tied")[0], progress=False)
    path = tied / "model.safetensors"
    embeddings = load_file(path)["model.embed_tokens.weight"].clone()
    change_tensors(path, lm_head__weight=embeddings)
    if is_alone:
        change_tensors(path, model__embed_tokens__weight=None)
    checked = check_checkpoint(tied)
    assert (checked.warnings, checked.config.tie_embeddings) == ((), True)
    assert_same(load_decoder(tied, progress=False), plain)


@torch.inference_mode()
def test_a_head_that_differs_from_the_embeddings_is_used_with_a_warning(tied, caplog):
    """As in transformers, whatever `tie_word_embeddings` says."""
    path = tied / "model.safetensors"
    change_tensors(path, lm_head__weight=load_file(path)["model.embed_tokens.weight"].flip(0).contiguous())
    ours, theirs = load_decoder(tied, progress=False), AutoModelForCausalLM.from_pretrained(tied)
    ids = torch.arange(3, 40).unsqueeze(0)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    (warning,) = check_checkpoint(tied).warnings
    assert warning in caplog.messages
    assert warning.startswith(f"{path} holds lm_head.weight, which differs from the embeddings")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which differs"):
        load_checkpoint(DecoderModel.from_config(load_model_config(tied)), tied, progress=False)


def test_a_missing_head_may_be_the_embeddings(tied, edit):
    """Llama's and Qwen's files are not tied unless they say so."""
    edit(tied / "config.json", tie_word_embeddings=None)
    assert refusal(tied) == (
        f"{tied} lacks lm_head.weight; set 'tie_word_embeddings' to true in config.json if the "
        "embeddings serve as the head"
    )


def test_an_adapter_that_is_not_merged_is_named(single):
    path = single / "model.safetensors"
    rename_tensors(path, lambda name: name.replace("1.self_attn.q_proj.weight", "1.self_attn.q_proj.base_layer.weight"))
    message = (
        "q_proj.base_layer.weight, of an adapter that is not merged; save the model behind PEFT's merge_and_unload()"
    )
    assert message in refusal(single)


def test_numbers_past_the_range_of_float16_are_refused_there(single):
    """Infinity in the file itself is the model's own, as in a mask."""
    path = single / "model.safetensors"
    norm = load_file(path)["model.norm.weight"]
    norm[3] = -1e5
    change_tensors(path, model__norm__weight=norm)
    assert load_decoder(single, dtype=torch.bfloat16, progress=False).norm.weight.isfinite().all()
    with pytest.raises(CheckpointError, match=r"norm\.weight holds numbers past the range of float16; set dtype"):
        load_decoder(single, dtype=torch.float16, progress=False)
    norm[3] = float("inf")
    change_tensors(path, model__norm__weight=norm)
    assert load_decoder(single, dtype=torch.float16, progress=False).norm.weight[3].isinf()


def test_shards_in_a_folder(sharded, single):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = {name: f"weights/{file.upper()}" for name, file in content["weight_map"].items()}
    index.write_text(json.dumps({**content, "weight_map": weight_map}))
    (sharded / "weights").mkdir()
    for path in sharded.glob("*.safetensors"):
        path.rename(sharded / "weights" / path.name.upper())
    assert_same(load_decoder(sharded, progress=False), load_decoder(single, progress=False))


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
    "content",
    ["{", "{}", *('{"weight_map": {"a": %s}}' % file for file in ('"../b"', '"/b"', '"x/../../b"', '""', "1"))],  # noqa: UP031
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
    assert "holds model.layers.0.self_attn.q_proj.bias, for which config.json has no place" in refusal(single)


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
