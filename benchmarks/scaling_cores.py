"""CPU that a fleet's processes use, in cores, read from `/proc`."""

import contextlib
import os
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

from chaos.fleet import Fleet

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class CoreMeter:
    """Measures while its body runs; then `cores` has cores in use by kind of process.

    Args:
        fleet: whose routers and replicas are told apart from the rest.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.cores: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._before = self._ticks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        elapsed = (time.monotonic() - self._began) * _TICKS_A_SECOND
        after = self._ticks()
        self.cores = {kind: round((after[kind] - self._before[kind]) / elapsed, 2) for kind in sorted(after)}

    def _ticks(self) -> Counter[str]:
        """Clock ticks used so far, of processes that still run."""
        kinds = dict.fromkeys(self._fleet.router_pids(), "routers")
        kinds |= dict.fromkeys(self._fleet.replica_pids(), "replicas")
        ticks: Counter[str] = Counter()
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            with contextlib.suppress(OSError, IndexError):
                name = (path / "comm").read_text().strip()
                kind = kinds.get(pid) or ("haproxy" if name.startswith("haproxy") else None)
                if kind is not None:
                    fields = (path / "stat").read_text().rpartition(")")[2].split()
                    ticks[kind] += int(fields[11]) + int(fields[12])
        return ticks
