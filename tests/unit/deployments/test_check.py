"""`python -m deployments.check`: one line that names the file and the fix, and an exit code that scripts can use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deployments.check import check_config_file
from llm.errors import LLMError

ROOT = Path(__file__).parents[3]


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
    ],
)
def test_broken_checkpoints_are_found_without_loading(tmp_path, damage, message):
    config = write_config(tmp_path, model=str(broken_checkpoint(tmp_path, damage)))
    with pytest.raises(LLMError, match=message) as caught:
        check_config_file(config)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("text", ["applications: [", "[]", "applications: [{import_path: other:app}]"])
def test_files_without_an_application_are_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LLMError, match=r"config\.yaml"):
        check_config_file(path)
