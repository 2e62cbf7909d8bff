"""Directories as people have them: what can be read is read, and the rest is one line that says what is there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.errors import LLMError
from llm.tokenization.hf_tokenizer import HFTokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9123456\n"
IDS = torch.arange(3, 40).unsqueeze(0)
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def model(checkpoints, tmp_path) -> Path:
    """A small checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoints("qwen3")[0], tmp_path / "model"))


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """The demo's tokenizer, without its model."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def refusal(load: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(LLMError) as info:
        load(*arguments)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_texts_with_a_byte_order_mark_are_what_they_are_without(tokenizer):
    """Editors on Windows put it there; in a template it would be one more character of every prompt."""
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "chat_template.jinja").write_text(config["chat_template"])
    expected = HFTokenizer.from_pretrained(tokenizer).apply_chat_template(CHAT)
    shape, defaults = load_model_config(tokenizer), load_generation_defaults(tokenizer)
    for path in tokenizer.iterdir():
        if path.is_file():
            path.write_bytes(BYTE_ORDER_MARK + path.read_bytes())
    assert HFTokenizer.from_pretrained(tokenizer).apply_chat_template(CHAT) == expected
    assert (load_model_config(tokenizer), load_generation_defaults(tokenizer)) == (shape, defaults)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_pointers_of_git_lfs_are_refused_as_such(model, name):
    shutil.copy(DEMO / "tokenizer.json", model)
    (model / name).write_text(POINTER)
    load = check_checkpoint if name in ("config.json", "model.safetensors") else HFTokenizer.from_pretrained
    assert refusal(load, model) == f"{model / name} is a pointer of Git LFS; get the file itself with: git lfs pull"


def test_a_snapshot_of_the_hubs_cache_loads_and_its_root_names_it(model, tmp_path):
    """Files are links into a directory beside the snapshots; a link may lead nowhere."""
    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for index, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, root / "blobs" / str(index))
        (snapshot / path.name).symlink_to(os.path.relpath(root / "blobs" / str(index), snapshot))
    assert torch.equal(load_decoder(snapshot, progress=False)(IDS), load_decoder(model, progress=False)(IDS))
    assert refusal(check_checkpoint, root).endswith(
        f"config.json is missing; {snapshot}/config.json is there: give {snapshot}"
    )
    for blob in (root / "blobs").iterdir():
        blob.unlink()
    assert "it is a link to ../../blobs/" in refusal(check_checkpoint, snapshot)


def test_a_directory_inside_is_named(model):
    assert refusal(check_checkpoint, model.parent).endswith(f"{model}/config.json is there: give {model}")


OTHER_DIRECTORIES = {
    "adapter_config.json": "is an adapter: give the model that it was trained on, and this directory as lora",
    "params.json": "is in the format of the model's makers; get the checkpoint in Hugging Face's format",
}


@pytest.mark.parametrize("name", OTHER_DIRECTORIES)
def test_directories_of_another_kind_are_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert refusal(check_checkpoint, tmp_path).endswith(OTHER_DIRECTORIES[name])


OTHER_WEIGHTS = {
    "adapter_config.json": "holds an adapter but no model; give the model that it was trained on",
    "tf_model.h5": "holds no .safetensors file, and tf_model.h5 is of another format",
    "consolidated.safetensors": "and consolidated.safetensors is of another format",
    "model.safetensors.incomplete": "and model.safetensors.incomplete is of another format",
    "pytorch_model-00001-of-00002.bin": "is a pickle, which can run code when loaded",
    "training_args.bin": "holds no .safetensors file; download the checkpoint again",
}


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_of_another_kind_are_named(model, name):
    (model / "model.safetensors").rename(model / name)
    assert OTHER_WEIGHTS[name] in refusal(check_checkpoint, model)


def test_weights_behind_a_broken_link_are_named(model):
    path = model / "model.safetensors"
    path.unlink()
    path.symlink_to("../blobs/lost")
    assert refusal(check_checkpoint, model).startswith(f"{path} is a link to ../blobs/lost, which is not there")


@pytest.mark.parametrize("name", ["", "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json"])
def test_the_tokenizer_that_is_there_instead_is_named_with_the_fix(tokenizer, name):
    (tokenizer / "tokenizer.json").unlink()
    if name:
        (tokenizer / name).write_text("{}")
    message = refusal(HFTokenizer.from_pretrained, tokenizer)
    assert f"there is only {name})" in message if name else "No such file" in message
    assert f"AutoTokenizer.from_pretrained('{tokenizer}').save_pretrained('{tokenizer}')" in message


def test_templates_may_stand_in_an_object_by_their_names(tokenizer, edit):
    """As transformers keeps them in memory, and takes them from the file."""
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    expected = HFTokenizer.from_pretrained(tokenizer).apply_chat_template(CHAT)
    templates = {"default": config["chat_template"], "tool_use": "{{ tools | length }}"}
    edit(tokenizer / "tokenizer_config.json", chat_template=templates)
    ours = HFTokenizer.from_pretrained(tokenizer)
    assert ours.apply_chat_template(CHAT) == expected
    assert ours.decode(ours.apply_chat_template(CHAT, tools=[{}, {}])) == "2"


def test_an_empty_template_is_none(tokenizer, edit):
    """The next file's counts; without one, chats are refused, not answered from an empty prompt."""
    expected = HFTokenizer.from_pretrained(tokenizer).apply_chat_template(CHAT)
    (tokenizer / "chat_template.jinja").write_text("\n")
    assert HFTokenizer.from_pretrained(tokenizer).apply_chat_template(CHAT) == expected
    edit(tokenizer / "tokenizer_config.json", chat_template="")
    assert not HFTokenizer.from_pretrained(tokenizer).has_chat_template


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused(model, name, dtype):
    """One is enough to make every answer wrong; infinity may stand where no token leads."""
    tensors = load_file(model / "model.safetensors")
    tensors[name].flatten()[-1] = float("nan")
    save_file(tensors, model / "model.safetensors")
    message = refusal(lambda: load_decoder(model, dtype=dtype, progress=False))
    assert message.startswith(f"{model}/model.safetensors: {name} holds NaN, and no answer can be computed")


QUANTIZED = {
    "model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32),
    "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
    "model.layers.0.mlp.up_proj.weight_scale_inv": torch.zeros(1, 1),
    "model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(8),
    "model.layers.0.mlp.up_proj.weight": torch.zeros(100, 1, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_that_nothing_speaks_of_are_refused_as_such(model, name):
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, name: QUANTIZED[name]}, model / "model.safetensors")
    message = refusal(check_checkpoint, model)
    assert name in message
    assert "which is quantized, but config.json does not say so for it" in message


FUSED = ["mixtral", "qwen3_moe_dense", "deepseek_v2_groups", "deepseek_v3", "glm4_moe", "qwen3_next_dense"]


@pytest.mark.parametrize("kind", FUSED)
@torch.inference_mode()
def test_experts_as_transformers_5_keeps_them_are_those_one_by_one(checkpoints, tmp_path, kind):
    """All experts of a layer in one tensor for each projection, which is what `save_original_format=False` writes."""
    directory, theirs = checkpoints(kind)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    ours, expected = (load_decoder(each, progress=False) for each in (tmp_path, directory))
    assert torch.equal(ours(IDS), expected(IDS))
