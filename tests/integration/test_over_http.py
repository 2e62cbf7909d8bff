"""The benchmark of whole servers: ours is started, loaded and stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

from live_server import ROOT, free_port


def test_our_server_is_measured(tmp_path: Path):
    command = [
        sys.executable, "-m", "benchmarks.over_http", "--model", "configs/demo", "--routers", 1, "--requests", 8,
        "--lens", "8-16", "--token-ids", "97-122", "--port", free_port(), "--work-dir", tmp_path,
        "--out", tmp_path / "http.jsonl",
    ]  # fmt: skip
    own_cluster = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=240, env=own_cluster, check=False
    )
    log = tmp_path / "rayline.log"
    assert done.returncode == 0, done.stderr[-2000:] + log.read_text()[-2000:]
    row = json.loads((tmp_path / "http.jsonl").read_text())
    assert (row["server"], row["model"]) == ("rayline", "demo")
    assert len(row["output_tok_s"]) == 2
    assert min(row["output_tok_s"]) > 0
    assert row["one_client"]["ttft_p50_ms"] > 0
    assert "Stopping" in log.read_text()
