"""A changed `user_config` of the router takes effect, and restarts nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import ROOT


@pytest.mark.timeout(180)
def test_user_config_changes_a_running_router():
    script = Path(__file__).parent / "change_user_config.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=150, env={**os.environ, "PYTHONPATH": paths}
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert lines, result.stdout[-2000:] + result.stderr[-2000:]
    outcome = json.loads(lines[-1])
    assert outcome["was_open"]
    assert outcome["is_closed"], "the new bound on the queue has no effect"
    assert outcome["before"] == outcome["after"], "something was restarted"
