"""`python -m deployments.check`: one line that names the file and the fix, and an exit code that scripts can use."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner
from vector_checkpoints import make_checkpoint

from benchmarks.random_adapter import write_random_adapter
from deployments.check import check_config_file
from deployments.cli import app
from deployments.cli.check import check
from deployments.config import AppConfig, resolve_paths
from deployments.serve.config_file import check_model
from llm.checkpoint.model_config import load_model_config
from llm.errors import LLMError
from llm.tokenization.hf_tokenizer import HFTokenizer

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs" / "demo"


def write_config(tmp_path: Path, **args) -> Path:
    application = {"name": "rayline", "import_path": "deployments.app:build_app", "args": args}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    return path


def broken_checkpoint(tmp_path: Path, damage: str) -> Path:
    """The demo checkpoint with one thing wrong."""
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "configs" / "demo", directory)
    weights = directory / "model.safetensors"
    config = json.loads((directory / "config.json").read_text())
    match damage:
        case "cut short":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "missing":
            weights.unlink()
        case "tokenizer":
            (directory / "tokenizer.json").unlink()
        case "missing shard":
            index = {"weight_map": dict.fromkeys(load_file(weights), "model-00002-of-00002.safetensors")}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
            save_file({"model.norm.weight": torch.ones(256)}, directory / "model-00001-of-00002.safetensors")
            weights.unlink()
        case "missing tensor":
            tensors = load_file(weights)
            del tensors["model.norm.weight"]
            save_file(tensors, weights)
        case "shape":
            (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 700}))
        case "unknown key":
            (directory / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
        case "sampling":
            (directory / "generation_config.json").write_text(json.dumps({"min_p": 7}))
        case "template that fails":
            (directory / "chat_template.jinja").write_text("{{ messages[5].content.nothing() }}")
        case "template that is no Jinja":
            (directory / "chat_template.jinja").write_text("{% if %}")
        case "template that is no text":
            (directory / "chat_template.jinja").write_bytes(b"\xff")
        case "template past the vocabulary":
            (directory / "added_tokens.json").write_text(json.dumps({"<|late|>": 264}))
            (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|late|>"]}))
            (directory / "chat_template.jinja").write_text("<|late|>{{ messages[0].content }}")
        case "template list":
            (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": ["x"]}))
        case "tokenizer_config":
            (directory / "tokenizer_config.json").write_text("[")
        case "tokenizer of another model":
            content = json.loads((directory / "tokenizer.json").read_text())
            letter = next(text for text, i in content["model"]["vocab"].items() if i == ord("W"))
            content["model"]["vocab"][letter] = 5000
            (directory / "tokenizer.json").write_text(json.dumps(content))
        case "architectures":
            (directory / "config.json").write_text(json.dumps({**config, "architectures": 5}))
        case "architecture":
            (directory / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    return directory


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut short", "model.safetensors is damaged or cut short"),
        ("missing", "holds no .safetensors file"),
        ("missing shard", "model-00002-of-00002.safetensors is missing"),
        ("missing tensor", "lacks model.norm.weight"),
        ("shape", r"down_proj.weight has shape \(256, 704\), config.json asks for \(256, 700\)"),
        ("architecture", "GPT2LMHeadModel"),
        ("unknown key", r"config.json: 'final_logit_softcapping' is 30.0, .* not supported for LlamaForCausalLM"),
        ("sampling", "generation_config.json: min_p"),
        ("tokenizer", "tokenizer.json"),
        ("template that fails", r"chat_template.jinja: the chat template cannot render a plain chat"),
        ("template that is no Jinja", r"chat_template.jinja: the chat template is not valid Jinja"),
        ("template that is no text", r"chat_template.jinja cannot be read"),
        ("template past the vocabulary", r"chat_template.jinja: .* token ids must be below the vocabulary's 264"),
        ("template list", r"tokenizer_config.json: 'chat_template' is \['x'\], but must be"),
        ("tokenizer_config", "tokenizer_config.json cannot be read as JSON"),
        (
            "tokenizer of another model",
            r"model: does its tokenizer belong to this model\? .* below the vocabulary's 264",
        ),
        ("architectures", r"config.json: 'architectures' is 5, but must be a list of words"),
    ],
)
def test_broken_checkpoints_are_found_without_loading(tmp_path, damage, message):
    config = write_config(tmp_path, model=str(broken_checkpoint(tmp_path, damage)))
    with pytest.raises(LLMError, match=message) as caught:
        check_config_file(config)
    assert "\n" not in str(caught.value)


def saved_today(directory: Path) -> None:
    """The demo checkpoint, loaded and saved by transformers."""
    AutoModelForCausalLM.from_pretrained(DEMO).save_pretrained(directory)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(directory)


def saved_a_year_ago(directory: Path) -> None:
    """The demo checkpoint, in the files that transformers 4.46 wrote of one."""
    shutil.copytree(DEMO, directory)
    config = json.loads((DEMO / "config.json").read_text())
    for key in ("dtype", "rope_parameters"):
        del config[key]
    older = {"_name_or_path": "/home/somebody/run-3", "torch_dtype": "bfloat16", "rope_theta": 10000.0,
             "rope_scaling": None, "_attn_implementation_autoset": True, "transformers_version": "4.46.1"}  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**config, **older}))
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text())
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    names = json.loads((DEMO / "tokenizer_config.json").read_text())
    decoder = {str(token["id"]): {flag: token[flag] for flag in flags} for token in tokenizer["added_tokens"]}
    of_text = {token["content"]: {flag: token[flag] for flag in flags[:5]} for token in decoder.values()}
    special = {key: of_text[text] for key, text in names.items() if key.endswith("_token")}
    others = [text for text in of_text if text not in {each["content"] for each in special.values()}]
    (directory / "special_tokens_map.json").write_text(json.dumps({**special, "additional_special_tokens": others}))
    more = {"added_tokens_decoder": decoder, "additional_special_tokens": others, "legacy": False,
            "tokenizer_class": "LlamaTokenizer", "sp_model_kwargs": {}, "use_default_system_prompt": False}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps({**names, **more}))
    generation = {
        "_from_model_config": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "transformers_version": "4.46.1",
    }
    (directory / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize("save", [saved_today, saved_a_year_ago])
def test_directories_of_both_generations_of_transformers_are_sound(tmp_path, save):
    """No warning, the same model, and the same tokens of a chat."""
    directory = tmp_path / "model"
    save(directory)
    config, original = (resolve_paths(AppConfig(model=str(each))) for each in (directory, DEMO))
    report, expected = check_model(config), check_model(original)
    assert report.warnings == ()
    assert report.model == expected.model
    chat = [{"role": "user", "content": "naïve <|end|>"}]
    ours, theirs = (HFTokenizer.from_pretrained(each) for each in (directory, DEMO))
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert (ours.eos_token_ids, ours.vocab_size) == (theirs.eos_token_ids, theirs.vocab_size)


@pytest.mark.parametrize("kind", ["torch", "emulated"])
def test_a_template_of_the_configuration_is_tried_too(tmp_path, kind):
    config = write_config(tmp_path, chat_template="{{ messages[0].nothing.at_all }}", engine_kind=kind)
    with pytest.raises(LLMError, match="chat_template: the chat template cannot render a plain chat"):
        check_config_file(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_seq_len", 4096, "max_seq_len 4096 is past the model's context of 2048 tokens"),
        ("attention_backend", "fastest", "unknown attention_backend 'fastest'; known: reference, sdpa, triton"),
    ],
)
def test_an_engine_that_the_model_cannot_have_is_found_without_loading(tmp_path, key, value, message):
    with pytest.raises(LLMError, match=message):
        check_config_file(write_config(tmp_path, engine={key: value}))


def write_adapter(directory: Path, rank: int = 2, **changes: object) -> Path:
    """An adapter on a layer of the demo model."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.zeros(rank, 256), name.format("B"): torch.zeros(256, rank)}
    save_file(factors, directory / "adapter_model.safetensors")
    return directory


def test_adapters_are_tried(tmp_path):
    assert check_config_file(write_config(tmp_path, lora=str(write_adapter(tmp_path / "fine"))))
    for name, changes, message in (
        ("missing", None, "lora: .*missing is not a directory"),
        ("rank", {"rank": 3}, "adapter_model.safetensors: .* has lora_A and lora_B of shapes"),
        ("kind", {"peft_type": "IA3"}, "adapter_config.json: peft_type 'IA3' is not supported"),
        ("type", {"lora_alpha": "4"}, "adapter_config.json: lora_alpha: "),
    ):
        if changes is not None:
            write_adapter(tmp_path / name, **changes)
        with pytest.raises(LLMError, match=message) as caught:
            check_config_file(write_config(tmp_path, lora=str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_adapters_on_experts_need_room_for_them(tmp_path, capsys):
    """Without it they are refused before anything starts, with the setting's name; with it the table says how much."""
    directory = make_checkpoint(tmp_path / "model")
    shape = json.loads((directory / "config.json").read_text())
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}
    config = Qwen3MoeConfig(**{key: shape[key] for key in kept}, **sizes, max_position_embeddings=1024)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    write_random_adapter(load_model_config(directory), tmp_path / "adapter", rank=2, with_experts=True)
    args = {"model": str(directory), "adapters": [{"name": "a", "path": str(tmp_path / "adapter")}]}
    with pytest.raises(LLMError, match=r"adapters, 'a': .*set adapter_experts: true") as caught:
        check_config_file(write_config(tmp_path, **args, engine={"max_adapters": 2}))
    assert "\n" not in str(caught.value)
    check(write_config(tmp_path, **args, engine={"max_adapters": 2, "adapter_experts": True}), gpu_memory="24")
    assert "of rank 16, routers and experts included" in " ".join(capsys.readouterr().out.split())


def test_a_head_that_differs_from_the_embeddings_is_told(tmp_path, capsys):
    """The command prints what the checkpoint's own files say wrongly, and passes."""
    directory = tmp_path / "model"
    shutil.copytree(ROOT / "configs" / "demo", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, directory / "model.safetensors")
    check(write_config(tmp_path, model=str(directory)), gpu_memory="24")
    assert "holds lm_head.weight, which differs from the embeddings" in capsys.readouterr().out


@pytest.mark.parametrize("path", [ROOT / "serve_config.yaml", ROOT / "configs" / "demo-two-replicas.yaml"])
def test_shipped_configurations_are_sound(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check_config_file(path)


def test_command_line(tmp_path):
    """A misspelt key: exit code 1 and one line that names the file, the key and the nearest known one."""
    config = write_config(tmp_path, engine={"max_batch_sise": 8})
    command = [sys.executable, "-m", "deployments.check", str(config)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert str(config) in line
    assert "did you mean 'max_batch_size'?" in line


def test_a_model_is_checked_without_a_file(tmp_path, monkeypatch):
    """As `rayline serve MODEL` would serve it; with several GPUs, whose parts are smaller, or with any setting."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, tmp_path / "my-model")

    def checked(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["check", *arguments])
        return " ".join((result.output if result.exception is None else str(result.exception)).split())

    assert re.search(r"model my-model, 1 replica.* weights 0\.\d+ GiB .* a GPU of 80 GiB about", checked("my-model"))
    assert "on each of 2 GPUs" in checked("my-model", "--tp", "2")
    assert "tensor_parallel_size 3 does not divide" in checked("my-model", "--tp", "3")
    assert "max_seq_len 1000000 is past the model's" in checked("my-model", "--set", "engine.max_seq_len=1000000")
    config = str(write_config(tmp_path, model="my-model"))
    assert "on each of 2 GPUs" in checked(config, "--tp", "2")
    assert "your-model: no such file" in checked("your-model")


@pytest.mark.parametrize("text", ["applications: [", "[]", "applications: [{import_path: other:app}]"])
def test_files_without_an_application_are_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LLMError, match=r"config\.yaml"):
        check_config_file(path)


def test_a_model_that_cannot_be_cut_so_is_refused_before_anything_starts():
    args = {"model": str(DEMO), "device": "cpu", "engine": {"tensor_parallel_size": 3}}
    with pytest.raises(LLMError, match="tensor_parallel_size") as caught:
        check_model(resolve_paths(AppConfig.model_validate(args)))
    assert "\n" not in str(caught.value)
    check_model(resolve_paths(AppConfig.model_validate({**args, "engine": {"tensor_parallel_size": 2}})))


def test_a_classifier_is_called_one(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "model", labels=["bad", "fair", "good"])
    check(write_config(tmp_path, model=str(checkpoint)))
    assert "classifies texts, with 3 labels" in " ".join(capsys.readouterr().out.split())
