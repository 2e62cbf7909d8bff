"""An adapter that one node got from the Hub: an engine on a node that lacks the files gets the same revision itself.

Nodes are processes here, with a cache each, because the Hub's address and the cache's place are read once a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import REVISION, serve_hub
from small_adapters import write_adapter

from llm.checkpoint.adapter_digest import adapter_digest
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterRef, GenerationRequest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "configs" / "demo"
_CATALOG = """
from deployments.adapters.directory import AdapterRules, read_adapter
from deployments.adapters.follower import AdapterFollower
from llm.serving.schemas import AdapterRef
rules = AdapterRules(8, 1 << 30)
follower = AdapterFollower("m", {"far": "some-org/far"}, None, 9, lambda path: read_adapter(path, rules))
while not follower.is_settled:
    follower.look()
found = follower.found["far"]
print(AdapterRef(name=found.name, path=found.path, digest=found.digest, origin=found.origin).model_dump_json())
"""
_ENGINE = """
import sys
sys.path.insert(0, "tests/unit/deployments")
from test_adapters_from_hub import answer
from llm.serving.schemas import AdapterRef
print(answer(AdapterRef.model_validate_json(sys.argv[1])))
"""


def answer(adapter: AdapterRef) -> str:
    """What an engine makes of a request with the adapter, or why it cannot."""
    config = EngineConfig(max_seq_len=256, max_adapters=1, max_adapter_rank=8)
    engine = ContinuousBatchingEngine.from_pretrained(
        DEMO, config=config, device="cpu", dtype=torch.float32, progress=False
    )
    request = GenerationRequest(prompt="What is 17 + 25?", max_new_tokens=12, temperature=0, adapter=adapter)
    [result] = engine.generate([request], progress=False)
    engine.close()
    return json.dumps([result.token_ids, result.adapter_failure, result.error])


def run_node(home: Path, url: str, script: str, *arguments: str) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/unit'}",
    }
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


def test_a_node_without_the_files_gets_them_itself(tmp_path: Path):
    files = write_adapter(tmp_path / "files", seed=5)
    (files / "README.md").write_text("not needed")
    with serve_hub("some-org/far", files) as (url, sent):
        ref = AdapterRef.model_validate_json(run_node(tmp_path / "first", url, _CATALOG))
        assert ref.digest == adapter_digest(files)
        assert ref.origin == f"some-org/far@{REVISION}"
        (tmp_path / "first").rename(tmp_path / "elsewhere")
        sent.clear()
        found = run_node(tmp_path / "second", url, _ENGINE, ref.model_dump_json())
        assert sorted(sent) == ["adapter_config.json", "adapter_model.safetensors"]
    assert found == answer(ref.model_copy(update={"path": str(files)}))
    assert json.loads(found)[1:] == [None, None]
    assert run_node(tmp_path / "second", url, _ENGINE, ref.model_dump_json()) == found, (
        "without the Hub, from the cache"
    )
    refused = json.loads(run_node(tmp_path / "third", url, _ENGINE, ref.model_dump_json()))
    assert refused[:2] == [[], "adapter_not_loaded"]
    assert "cannot be downloaded from the Hub now" in refused[2]
