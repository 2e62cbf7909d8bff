from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import cloudpickle
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from deployments.app import build_app
from deployments.channel.messages import EngineInfo
from deployments.config import AppConfig, resolve_paths, without_secrets
from deployments.router.keys import find_keys
from deployments.serve.banner import AnnouncedModel, Announcement, ready_banner
from deployments.serve.front_end import FrontEnd, check_open
from llm.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ({"modle": "x"}, "did you mean 'model'?"),
        ({"replicas": {"num_replica": 2}}, "did you mean 'num_replicas'?"),
        ({"engine": {"max_batchsize": 2}}, "did you mean 'max_batch_size'?"),
        ({"dtype": "int8"}, "float32"),
        ({"replicas": {"num_replicas": 0}}, "greater than or equal to 1"),
        ({"api_keys": [" "]}, "empty key"),
    ],
)
def test_mistakes_are_named(args: dict, hint: str):
    with pytest.raises(ValidationError, match=hint.replace("?", r"\?")):
        AppConfig.model_validate(args)


def test_relative_directories_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(AppConfig(model="models/mine"))
    assert config.model == str(tmp_path / "models" / "mine")
    assert config.model_name == "mine"
    assert resolve_paths(AppConfig(model="org/name")).model == "org/name"
    assert resolve_paths(AppConfig(model="org/name")).model_name == "org/name"


def test_keys_come_from_all_three_places_and_are_never_shown(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.setenv("RAYLINE_TEST_KEYS", "three, four")
    config = AppConfig.model_validate(
        {"api_keys": ["sk-zero"], "api_keys_file": str(tmp_path / "keys"), "api_keys_env": "RAYLINE_TEST_KEYS"}
    )
    assert len(set(find_keys(config).keys)) == 5
    assert "sk-zero" not in repr(config) + str(config.model_dump())
    assert without_secrets(config).api_keys == ()
    assert find_keys(AppConfig()).keys == ()


@pytest.mark.parametrize("args", [{"api_keys_file": "/nowhere/keys"}, {"api_keys_env": "RAYLINE_NOT_SET"}])
def test_keys_that_cannot_be_found_stop_the_start(args: dict):
    """Else the server would be open to everyone by mistake."""
    with pytest.raises(ConfigError):
        find_keys(AppConfig(**args))


def test_an_open_port_needs_keys_or_a_word():
    everywhere, here = FrontEnd("0.0.0.0", 8000), FrontEnd("127.0.0.1", 8000)
    with pytest.raises(ConfigError, match="allow_open_without_keys"):
        check_open(AppConfig(), False, everywhere)
    check_open(AppConfig(), True, everywhere)
    check_open(AppConfig(), False, here)
    check_open(AppConfig(), False, None)
    check_open(AppConfig(allow_open_without_keys=True), False, everywhere)


def test_urls():
    assert FrontEnd("0.0.0.0", 80, "/api").url == "http://127.0.0.1:80/api"
    assert FrontEnd("::1", 80).url == "http://[::1]:80"


def test_the_banner_is_one_block_with_a_line_to_paste():
    info = EngineInfo(
        model="demo", max_seq_len=2048, num_slots=65536, page_size=16, max_step_tokens=512, vocab_size=320,
        device="cuda:0", dtype="bfloat16", backend="triton", weight_bytes=3 << 30, kv_cache_bytes=200 << 20,
    )  # fmt: skip
    banner = ready_banner(
        "http://127.0.0.1:8000",
        Announcement([AnnouncedModel("demo", "demo", 2, info)], True),
        {"dashboard": "http://d"},
    )
    first, *rows, command = banner.splitlines()
    assert first == "Rayline is ready: http://127.0.0.1:8000"
    assert dict(row.split(maxsplit=1) for row in rows) == {
        "chat": "http://127.0.0.1:8000/",
        "fleet": "http://127.0.0.1:8000/fleet",
        "API": "http://127.0.0.1:8000/v1, described at http://127.0.0.1:8000/docs",
        "model": "demo",
        "device": "cuda:0, bfloat16",
        "context": "2,048 tokens",
        "slots": "65,536 tokens in each of 2 replicas",
        "memory": "3.0 GiB of weights, 200 MiB of keys and values in each of 2 replicas",
        "dashboard": "http://d",
    }
    assert command.startswith("  curl http://127.0.0.1:8000/v1/chat/completions")
    assert "Authorization: Bearer" in command


def test_a_fleet_at_zero_has_a_banner_too():
    assert "none yet" in ready_banner(
        "http://127.0.0.1:8000", Announcement([AnnouncedModel("demo", "demo", 0, None)], False)
    )


@pytest.mark.parametrize("path", [ROOT / "serve_config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))], ids=str)
def test_the_configurations_that_we_ship_are_valid(path: Path):
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for application in config.applications:
        args = AppConfig.model_validate(application.args)
        is_open = config.http_options.host == "0.0.0.0"
        assert not is_open or args.api_keys_env or args.api_keys_file, "open to everyone"


@pytest.mark.usefixtures("no_cluster")
def test_build_app_finds_mistakes_in_the_checkpoint_at_once(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="BertModel is not supported"):
        build_app(AppConfig(model=str(tmp_path)))


@pytest.mark.usefixtures("no_cluster")
def test_there_is_an_app_for_serve_build():
    import deployments.app

    assert isinstance(deployments.app.app, Application)


@pytest.mark.usefixtures("no_cluster")
def test_every_deployment_starts_with_few_malloc_arenas():
    """With glibc's default of eight a core, free memory collects in each of them (F12)."""
    deployments = deployments_of({})
    assert set(deployments) == {"Router", "EngineReplica"}
    for deployment in deployments.values():
        environment = deployment.ray_actor_options["runtime_env"]["env_vars"]
        assert environment["MALLOC_ARENA_MAX"] == "2", deployment.name


def deployments_of(args: dict) -> dict[str, Any]:
    """What `build_app` binds, by name."""
    found: dict[str, Any] = {}
    waiting = [build_app(AppConfig.model_validate(args))]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        arguments = [one for arg in deployment.init_args for one in (arg.values() if isinstance(arg, dict) else [arg])]
        waiting += [argument for argument in arguments if isinstance(argument, Application)]
    return found


LIMITED = {"limits": {"per_key": {"requests_per_min": 5}}}


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("args", "has_accountant"),
    [
        ({"router": {"num_replicas": 2}}, False),
        ({"router": {"num_replicas": 2}, "api_keys": ["sk-one"]}, True),
        ({"router": {"num_replicas": 2}, "accounts": {"record": "usage.jsonl"}}, True),
        ({"router": {"num_replicas": 2}, **LIMITED}, False),
        ({"router": {"num_replicas": 1}, "api_keys": ["sk-one"], **LIMITED}, False),
        ({"router": {"num_replicas": 2}, "api_keys": ["sk-one"], **LIMITED}, True),
        ({"router": {"num_replicas": 2}, "api_keys_file": "keys"}, True),
    ],
)
def test_an_accountant_is_bound_where_several_routers_count_together(args, has_accountant, tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("sk-one\n")
    if "api_keys_file" in args:  # which may get limits later
        args = {**args, "api_keys_file": str(tmp_path / "keys")}
    assert ("Accountant" in deployments_of(args)) == has_accountant


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("num_routers", "max_responses", "has_store"), [(1, 100, False), (2, 100, True), (2, 0, False)]
)
def test_a_store_is_bound_where_several_routers_share_responses(num_routers, max_responses, has_store):
    args = {"router": {"num_replicas": num_routers}, "responses": {"max_responses": max_responses}}
    assert ("ResponseStore" in deployments_of(args)) == has_store


@pytest.mark.usefixtures("no_cluster")
def test_nothing_that_is_bound_holds_a_key(tmp_path, monkeypatch):
    (tmp_path / "keys.yaml").write_text("- {name: team, key: sk-in-file, requests_per_min: 5}\n")
    monkeypatch.setenv("RAYLINE_TEST_KEYS", "sk-in-variable")
    args = {
        "api_keys": ["sk-in-config"], "api_keys_file": str(tmp_path / "keys.yaml"),
        "api_keys_env": "RAYLINE_TEST_KEYS", "router": {"num_replicas": 2},
    }  # fmt: skip
    bound = deployments_of(args)
    for deployment in bound.values():
        arguments = [arg for arg in deployment.init_args if not isinstance(arg, Application)]
        for text in (cloudpickle.dumps(arguments), repr(arguments).encode()):
            assert b"sk-in" not in text, deployment.name
    keys = bound["Router"].init_args[1]
    assert len(keys.keys) == 3
    assert keys.path == str(tmp_path / "keys.yaml")
