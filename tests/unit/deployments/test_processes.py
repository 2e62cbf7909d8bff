"""No process outlives the one that started it, whatever its parent does."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")

# A child in a session of its own starts another and is gone: what is left belongs to nobody.
_SCRIPT = '''
import subprocess, sys, time
from deployments.serve.processes import adopt_orphans, descendants, kill_descendants
adopt_orphans()
leaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = f"""
import subprocess, sys
leaf = subprocess.Popen([sys.executable, "-c", {leaf!r}], start_new_session=True, stdout=subprocess.DEVNULL)
print(leaf.pid)
"""
command = [sys.executable, "-c", child]
orphan = subprocess.run(command, stdout=subprocess.PIPE, start_new_session=True, text=True).stdout
assert int(orphan) in descendants()
kill_descendants()
assert descendants() == []
print(orphan)
'''


def test_orphans_are_found_and_killed():
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 5
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline, "the orphan is still there"
        time.sleep(0.01)
