"""Several models on the command line: what `rayline` checks, sets, finds and shows of each."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from in_process import DEMO
from rich.console import Console
from test_model_directory import entry, platform, serving
from typer.testing import CliRunner

from deployments.channel.messages import EngineInfo
from deployments.cli import app
from deployments.cli.serve import _find_models, _override
from deployments.cli.settings import read_content
from deployments.cli.status import _table
from deployments.serve.banner import AnnouncedModel, Announcement, ready_banner
from deployments.serve.config_file import read_config_file
from llm.errors import ConfigError


def config_file(directory: Path, *models: dict[str, Any], **settings: Any) -> Path:
    path = directory / "platform.yaml"
    application = {"import_path": "deployments.app:build_app", "args": {"models": models, **settings}}
    path.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    return path


def test_check_goes_through_all_models(tmp_path: Path):
    shared = {"replicas": {"num_gpus": 0.75}}
    models = [
        {"model": str(DEMO), "served_model_name": "chat", "aliases": ["gpt"], **shared},
        {"model": str(DEMO), "served_model_name": "small", **shared},
    ]
    result = CliRunner().invoke(app, ["check", str(config_file(tmp_path, *models))])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "model chat, also called gpt, 1 replica(s)" in text
    assert "model small, 1 replica(s)" in text
    assert "0.75 of a GPU of 24 GiB" in text
    assert "take 1.5 of them (chat 0.75 + small 0.75)" in text


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([entry("a"), entry("b", lora="nowhere")], "lora: nowhere is not a directory"),
        ([entry("a"), entry("a")], "give each a `weight`"),
        ([{"model": str(DEMO)}, {"model": "configs/demo"}], "give each a `weight`"),
    ],
)
def test_one_model_that_cannot_be_served_is_enough_to_refuse(tmp_path: Path, models: list[Any], message: str):
    """In the last case only the directory, not what the file says, shows that both have the name `demo`."""
    result = CliRunner().invoke(app, ["check", str(config_file(tmp_path, *models))])
    assert result.exit_code == 1
    assert message in str(result.exception) + result.output


def test_a_setting_may_concern_one_of_the_models(tmp_path: Path):
    content = read_content(config_file(tmp_path, entry("a"), entry("b")))
    _override(content, None, None, None, None, None, None, ["models.1.replicas.num_replicas=3"])
    models = content["applications"][0]["args"]["models"]
    assert ("replicas" in models[0], models[1]["replicas"]) == (False, {"num_replicas": 3})
    for setting in ("models.2.dtype=float32", "models.b.dtype=float32"):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            _override(content, None, None, None, None, None, None, [setting])


def test_each_model_is_found_before_anything_starts(tmp_path: Path):
    """Its place is written into the file that Serve gets, and the name that it would have had without."""
    path = config_file(tmp_path, {"model": "configs/demo"}, {"model": "configs/demo", "served_model_name": "other"})
    content = read_content(path)
    _find_models(content, read_config_file(path).apps)
    models = content["applications"][0]["args"]["models"]
    assert [model["model"] for model in models] == [str(DEMO.resolve())] * 2
    assert [model["served_model_name"] for model in models] == ["demo", "other"]


async def test_status_names_the_models():
    async with serving(platform(entry("small"), entry("large")), {"large": 0}) as service:
        console = Console(record=True, width=150)
        console.print(_table(service.directory.snapshot(), {}))
    lines = console.export_text().splitlines()
    assert lines[0].split()[:2] == ["model", "replica"]
    assert lines[1].split()[:3] == ["small", "small-0", "serving"]
    assert "models: small ready, large starting" in lines


def test_the_banner_lists_the_models():
    info = EngineInfo("small", 4096, 100, 16, 100, 1000, "cuda:0", "bfloat16", "triton")
    models = [AnnouncedModel("small", "small", 2, info), AnnouncedModel("large", "large", 0, None)]
    banner = ready_banner("http://127.0.0.1:8000", Announcement(models, needs_key=False))
    assert "models    small (2 replicas, 4,096 tokens of context), large (asleep)" in banner
    assert '"model": "small"' in banner, "the request to paste"
