"""The benchmark of whole servers on one that runs, and the command by which it would start its own."""

import json
import socket
import subprocess
from pathlib import Path

from live_server import ROOT, Server

from benchmarks.over_http import OverHTTP, parse

DEMO = ROOT / "configs" / "demo"


def test_a_server_is_measured(server: Server, tmp_path: Path):
    options = parse(
        ["--model", str(DEMO), "--url", server.url, "--requests", "4", "--lens", "8-16", "--token-ids", "97-122",
         "--work-dir", str(tmp_path)]
    )  # fmt: skip
    row = OverHTTP(options, DEMO).measure("rayline")
    assert (row["server"], row["model"]) == ("rayline", "demo")
    assert len(row["output_tok_s"]) == 2
    assert min(row["output_tok_s"]) > 0
    assert row["one_client"]["ttft_p50_ms"] > 0
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rayline-*.json"))]
    assert [result["completed"] for result in results] == [4, 4, 4]


def test_its_own_server_would_start(tmp_path: Path):
    """`rayline serve` takes the command whole: the port is all that it has against it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = parse(["--model", str(DEMO), "--port", str(port), "--work-dir", str(tmp_path)])
        command = OverHTTP(options, DEMO).rayline_command()
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"rayline: port {port} of 127.0.0.1 is in use by another program")
