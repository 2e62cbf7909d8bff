"""The command line: what it makes of its options, and one line for what is wrong."""

import io
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from deployments.cli import app
from deployments.cli.chat import _Talk
from deployments.cli.check import _memory
from deployments.cli.serve import _override
from deployments.cli.settings import read_content
from deployments.config import AppConfig
from deployments.replica.model_memory import check_fits, fewest_gpus, share_of, slot_bytes, weight_bytes
from llm.checkpoint.model_config import load_model_config
from llm.config import EngineConfig, ModelConfig
from llm.core.paged_kv_cache import PagedKVCache
from llm.errors import ConfigError
from llm.models.decoder import DecoderModel

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


def rayline(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BIN / "rayline", *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT)


def overridden(*settings: str, **options) -> dict:
    content = read_content(ROOT / "serve_config.yaml")
    fields = {"model": None, "host": None, "port": None, "replicas": None, "tp": None, "api_keys_env": None, **options}
    _override(content, **fields, settings=list(settings))
    return content


def test_options_and_settings_go_over_the_file():
    content = overridden("engine.max_seq_len=1024", "dtype=float32", port=9000, replicas=3, model="some/model")
    assert content["http_options"] == {"host": "127.0.0.1", "port": 9000}
    assert content["applications"][0]["args"] == {
        "model": "some/model", "replicas": {"num_replicas": 3}, "engine": {"max_seq_len": 1024}, "dtype": "float32"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("set_aside", "then"), [((), None), (("replicas.num_gpus=1",), 2), (("replicas.num_gpus=0",), 0)]
)
def test_tp_takes_as_many_gpus_a_replica_as_it_says(set_aside, then):
    """Those of the file are for its own number; a file that wants CPUs gets processes on them."""
    content = overridden(*set_aside, model="some/model")
    _override(content, None, None, None, None, 2, None, [])
    args = content["applications"][0]["args"]
    assert args["engine"] == {"tensor_parallel_size": 2}
    assert args.get("replicas", {}).get("num_gpus") == then
    AppConfig.model_validate(args)


def test_other_gpus_than_the_model_has_parts_are_refused():
    with pytest.raises(ValueError, match=r"num_gpus: 1 is not engine.tensor_parallel_size: 2"):
        AppConfig.model_validate({"engine": {"tensor_parallel_size": 2}, "replicas": {"num_gpus": 1}})


@pytest.mark.parametrize("setting", ["engine", "=3", "engine.=3", "model.x=3"])
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="--set"):
        overridden(setting)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "is not YAML"), ("applications: []", "no list of applications"), ("x", "no list")],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_content(path)


def test_a_misspelt_setting_stops_serve_in_one_line():
    result = rayline("serve", "--set", "engine.max_seq_length=5")
    assert result.returncode == 1
    assert result.stderr.startswith("rayline: ")
    assert "max_seq_len" in result.stderr
    assert result.stderr.count("\n") == 1


def test_check_says_what_a_model_needs(tmp_path):
    """Each in a line of its own, however long the file's path is."""
    link = tmp_path.joinpath(*["a directory with a long name"] * 10)
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT, target_is_directory=True)
    result = CliRunner().invoke(app, ["check", str(link / "serve_config.yaml"), "--gpu-memory", "80"])
    assert result.exit_code == 0
    assert f"{link}/serve_config.yaml: model demo, 1 replica(s)\n" in result.output
    assert "a GPU of 80 GiB" in result.output
    assert "grouped queries" in result.output


def test_check_says_how_many_gpus_a_model_needs():
    """And what is on each of them, where there are several."""
    console = Console(record=True, file=io.StringIO(), width=120)
    for num_gpus in (1, 2):
        app = AppConfig(engine=EngineConfig(tensor_parallel_size=num_gpus))
        console.print(_memory(app, LLAMA_70B, [24, 141]))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "a GPU of 24 GiB too small; 8 of them hold it: engine.tensor_parallel_size: 8" in lines
    assert "a GPU of 141 GiB too small; 2 of them hold it: engine.tensor_parallel_size: 2" in lines
    assert "weights 131.42 GiB, 65.71 GiB on each of 2 GPUs (16 bits a number)" in lines
    assert any(re.fullmatch(r"2 GPUs of 141 GiB about 38\d,\d{3} slots: .*", line) for line in lines), lines


def test_check_of_a_broken_file_is_one_line():
    result = rayline("check", "nothing.yaml")
    assert result.returncode == 1
    assert result.stderr == (
        "rayline: nothing.yaml: no such file; the bundled configurations are demo-two-replicas, emulated, "
        "llama-3.1-8b, qwen3-8b-autoscaling\n"
    )


def test_memory_of_a_known_model():
    """Llama-3.1-8B: 8.03 billion parameters, 128 KiB a token in bfloat16."""
    model = ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_seq_len=131072,
    )  # fmt: skip
    assert weight_bytes(model, 2) == pytest.approx(2 * 8.03e9, rel=0.001)
    assert slot_bytes(model, 2) == 128 * 1024


@pytest.mark.parametrize(("num_layers", "every"), [(26, 6), (34, 6), (62, 6), (42, 2), (5, 7)])
def test_a_slot_is_counted_as_the_pool_holds_it(num_layers, every):
    """Gemma's shapes: pages of layers with a window and of those without have the same size, which leaves gaps."""
    windowed = tuple(layer for layer in range(num_layers) if (layer + 1) % every)
    shape = {"num_layers": num_layers, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden_size": 64}
    model = ModelConfig(architecture="Gemma3ForCausalLM", window_size=512, window_layers=windowed, **shape)
    decoder = DecoderModel.from_config(model, device="meta", dtype=torch.bfloat16)
    sizes = {"page_size": 16, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.bfloat16}
    page_bytes = PagedKVCache.bytes_per_page(decoder.page_groups, **sizes)
    assert slot_bytes(model, 2) == page_bytes * len(decoder.page_groups) / 16


def test_memory_of_latents():
    """DeepSeek-V3: 671 billion parameters; 576 numbers a token and layer, where keys and values would be 40,960."""
    model = ModelConfig(
        architecture="DeepseekV3ForCausalLM", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
        num_layers=61, num_heads=128, num_kv_heads=1, head_dim=576, num_experts=256, num_experts_per_token=8,
        expert_size=2048, shared_expert_size=2048, dense_layers=(0, 1, 2), routing={"uses_sigmoid": True},
        latent={"rank": 512, "query_rank": 1536, "plain_dim": 128, "rope_dim": 64, "value_dim": 128},
    )  # fmt: skip
    assert weight_bytes(model, 2) == pytest.approx(2 * 671.03e9, rel=0.001)
    assert slot_bytes(model, 2) == 61 * 576 * 2


LLAMA_70B = ModelConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8,
    max_seq_len=131072,
)  # fmt: skip


def test_memory_of_a_model_on_several_gpus():
    """Llama-3.3-70B: 70.6 billion parameters, 320 KiB a token; cut in two, half of both but for the norms."""
    whole, half = (share_of(AppConfig(), LLAMA_70B, num_gpus) for num_gpus in (1, 2))
    assert whole.weight_bytes == pytest.approx(2 * 70.6e9, rel=0.001)
    assert half.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=1e-3)
    assert (whole.slot_bytes, half.slot_bytes) == (320 * 1024, 160 * 1024)
    assert share_of(AppConfig(), LLAMA_70B, 16).slot_bytes == 40 * 1024, "one of eight heads, which two GPUs hold"


def test_memory_of_adapters_on_several_gpus():
    """Numbers of A and of B of each projection, at the largest rank; of one of the two a GPU holds a half."""
    app = AppConfig(engine={"max_adapters": 8, "max_adapter_rank": 16})
    hidden, mlp, keys = 8192, 28672, 1024
    whole = [hidden + hidden, *[hidden + keys] * 2, hidden + hidden, *[hidden + mlp] * 2, mlp + hidden]
    half = [hidden + hidden // 2, *[hidden + keys // 2] * 2, hidden // 2 + hidden, *[hidden + mlp // 2] * 2]
    half.append(mlp // 2 + hidden)
    for num_gpus, numbers in ((1, whole), (2, half)):
        assert share_of(app, LLAMA_70B, num_gpus).adapter_bytes == 8 * 80 * 16 * sum(numbers) * 2
    assert share_of(app, LLAMA_70B, 1).num_slots(192 << 30) < share_of(AppConfig(), LLAMA_70B, 1).num_slots(192 << 30)
    with pytest.raises(ConfigError, match=r"GiB of weights on each GPU \(with room for max_adapters adapters\)"):
        check_fits(app, LLAMA_70B, 80 << 30)


@pytest.mark.parametrize(("gib", "num_gpus"), [(24, 8), (80, 2), (141, 2), (192, 1), (8, 32), (2, None)])
def test_fewest_gpus_of_a_size(gib: int, num_gpus: int | None):
    share = fewest_gpus(AppConfig(), LLAMA_70B, gib << 30)
    assert (share.num_gpus if share is not None else None) == num_gpus


def test_a_model_that_does_not_fit_is_refused_with_what_would_do():
    app = AppConfig(model="some/llama-70b")
    refusal = r"131\.4 GiB.*engine.tensor_parallel_size: 2, .* or GPUs of 151 GiB"
    with pytest.raises(ConfigError, match=refusal) as caught:
        check_fits(app, LLAMA_70B, 141 << 30)
    assert "\n" not in str(caught.value)
    check_fits(app.model_copy(update={"engine": EngineConfig(tensor_parallel_size=2)}), LLAMA_70B, 141 << 30)
    with pytest.raises(ConfigError, match=r"key/value heads|divide"):
        check_fits(app.model_copy(update={"engine": EngineConfig(tensor_parallel_size=3)}), LLAMA_70B, 141 << 30)


def test_memory_of_a_model_with_states():
    """Qwen3.6 27B: 26.9 billion parameters, 64 KiB a token in 16 layers of 64, 154 MB a row in the others."""
    model = load_model_config(ROOT / "benchmarks/models/qwen3.6-27b")
    assert weight_bytes(model, 2) == pytest.approx(2 * 26.9e9, rel=0.003)
    assert slot_bytes(model, 2) == 64 * 1024
    assert model.state_bytes(2) == 48 * (3 * 10_240 * 2 + 48 * 128 * 128 * 4)


@pytest.mark.parametrize("command", ["chat", "status"])
def test_without_a_server_there_is_one_line(command):
    result = rayline(command, "--url", "http://127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr == "rayline: nothing answers at http://127.0.0.1:1; start a server with: rayline serve\n"


def test_doctor_finds_this_machine_usable():
    result = rayline("doctor")
    assert result.returncode == 0
    assert "Ray" in result.stdout


@pytest.mark.parametrize("command", ["serve", "chat", "check", "convert", "doctor", "pull", "status"])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert yaml.safe_dump(result.output)
    assert "Usage" in result.output


def test_chat_shows_thoughts_apart_and_keeps_them_out_of_the_conversation():
    """Against a real HTTP server that thinks, then answers."""
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "Hm, "}, {"reasoning_content": "42?"},
              {"content": "It is "}, {"content": "42."}]  # fmt: skip
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for delta in deltas:
                chunk = json.dumps({"choices": [{"index": 0, "delta": delta}]})
                self.wfile.write(f"data: {chunk}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    console = Console(record=True, file=io.StringIO())
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}") as client:
        talk = _Talk(client, console, "demo", None, {})
        talk.ask("What is 17 + 25?", with_stats=False)
        talk.ask("Sure?", with_stats=False)
    server.shutdown()
    server.server_close()
    assert console.export_text().splitlines()[:3] == ["Hm, 42?", "", "It is 42."]
    assert asked[1]["messages"][1] == {"role": "assistant", "content": "It is 42."}


def test_the_command_line_starts_without_pytorch():
    """It takes seconds to import, which `rayline --help` and `rayline status` do not need."""
    run = [sys.executable, "-c", "import sys, deployments.cli; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(run, cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("sizes", ["24GB", "", "nan", "24,inf", "0", "-5"])
def test_a_size_that_no_gpu_has_is_refused(sizes: str):
    result = CliRunner().invoke(app, ["check", "--gpu-memory", sizes])
    assert result.exit_code == 2
    assert "give sizes in GiB, separated by commas" in result.output
