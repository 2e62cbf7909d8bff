"""Requests made up from our own OpenAPI description: no 5xx, no answer that the description does not know.

`make fuzz` runs it for ten minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

from live_server import ROOT, Server

SECONDS = int(os.environ.get("FUZZ_SECONDS", "10"))
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_requests_by_the_schema(server: Server, tmp_path: Path):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", CHECKS,
        "--max-time", str(SECONDS), "--max-examples", str(10 * SECONDS), "--exclude-path", "/rayline/events",
        "--request-timeout", "30", "--warnings", "off", "--no-color", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=3 * SECONDS + 120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
    server.check_healthy()
