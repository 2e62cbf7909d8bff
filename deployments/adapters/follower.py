"""`AdapterFollower`: the adapters of one model that its configuration names or its folder holds, as they change."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deployments.adapters.directory import Signature, created_at, signature_of
from deployments.adapters.messages import KnownAdapter, Source
from deployments.adapters_config import check_client_name
from llm.checkpoint.hub import hub_origin, resolve_model_path
from llm.errors import LLMError

logger = logging.getLogger("ray.serve")

_HUB_RETRY_S = 30.0
_LOOKS_UNTIL_GONE = 2


@dataclass(slots=True)
class _Place:
    """One directory that may hold an adapter.

    Attributes:
        source: where its name comes from.
        directory: its path.
        seen: its directory and signature at the last look.
        taken: the same when it was read last, successfully or not; None if it has not been read.
        num_absent: looks in a row at which it was not there.
    """

    source: Source
    directory: Path
    seen: tuple[Path, Signature] | None = None
    taken: tuple[Path, Signature] | None = None
    num_absent: int = 0


class AdapterFollower:
    """Looks at a model's directories again and again. One thread at a time may look.

    New content counts once two looks in a row have found the same, and once it is whole, so that a directory that is
    being written is not taken up. Meanwhile the adapter of that name stays as it was. Directories that leave for less
    than two looks, such as while they are exchanged, do not count as removed.

    Args:
        key: key of the entry of `models`.
        entries: paths or Hub ids by name, from the configuration.
        folder: a directory whose subdirectories are adapters too; None for none.
        most: most adapters to know.
        read: checks a directory and returns the adapter's digest; raises LLMError.
        taken_names: names of models, which no adapter may have.
        clock: seconds; monotonic.

    Attributes:
        found: the adapters, by name.
        is_settled: whether everything that was there at the first look has been read, or cannot be served.
    """

    def __init__(
        self,
        key: str,
        entries: Mapping[str, str],
        folder: Path | None,
        most: int,
        read: Callable[[Path], str],
        taken_names: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found: dict[str, KnownAdapter] = {}
        self.is_settled = False
        self._broken: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._key = key
        self._entries = dict(entries)
        self._folder = folder
        self._most = most
        self._read = read
        self._taken_names = taken_names
        self._clock = clock
        self._places: dict[str, _Place] = {}
        self._hub_paths: dict[str, Path] = {}
        self._hub_asked_at: dict[str, float] = {}
        self._num_looks = 0

    @property
    def faults(self) -> dict[str, str]:
        """Why other names are not served, for people; "" stands for the whole folder."""
        return {**self._refused, **self._broken}

    def look(self) -> bool:
        """Look at everything and read at most one new adapter, so that it is known before the next one is read.

        Returns:
            Whether there is another one to read, for which one should look again at once.
        """
        self._num_looks += 1
        candidates = self._candidates()
        for name in self._places.keys() - candidates.keys():
            self._note_absent(name)
        ready: list[str] = []
        for name, (source, directory) in candidates.items():
            place = self._places.setdefault(name, _Place(source, directory))
            place.directory, place.num_absent = directory, 0
            if self._is_storage_away(name, place):
                continue
            signature = directory, signature_of(directory) or ()
            if name in self.found and signature == place.taken:
                self._note_mended(name)
            if signature == place.seen and signature != place.taken:
                ready.append(name)
            place.seen = signature
        if ready:
            self._take(ready[0])
        unread = [p for p in self._places.values() if p.taken is None and p.num_absent == 0]
        if not unread and self._num_looks > 1:
            self.is_settled = True
        return len(ready) > 1

    def _is_storage_away(self, name: str, place: _Place) -> bool:
        """Whether an adapter's files are gone without anybody having removed the adapter. What engines hold of it stays
        valid: its folder as a whole cannot be read, or the configuration still names it."""
        if place.source is Source.FOLDER:
            return "" in self._broken
        if name not in self.found or signature_of(place.directory) is not None:
            return False
        self._note_fault(name, f"{place.directory} is gone; only engines that hold the adapter serve it")
        return True

    def _candidates(self) -> dict[str, tuple[Source, Path]]:
        """The directories that should hold adapters, those of the configuration first."""
        candidates: dict[str, tuple[Source, Path]] = {}
        for name, path in self._entries.items():
            directory = self._locate(name, path)
            if directory is not None:
                candidates[name] = Source.CONFIGURED, directory
        refused: dict[str, str] = {}
        for name, directory in self._in_folder().items():
            fault = self._why_not(name, len(candidates))
            if fault is None:
                candidates[name] = Source.FOLDER, directory
            else:
                refused[name.encode(errors="backslashreplace").decode()] = fault
        for name in refused.keys() - self._refused.keys():
            logger.error("the adapter %r of model %s is not served: %s", name, self._key, refused[name])
        self._refused = refused
        return candidates

    def _locate(self, name: str, path: str) -> Path | None:
        """The directory of an entry; None while it cannot be had from the Hub."""
        local = Path(path).expanduser()
        if local.is_absolute() or local.is_dir():
            return local
        if name in self._hub_paths:
            return self._hub_paths[name]
        if self._clock() - self._hub_asked_at.get(name, -math.inf) < _HUB_RETRY_S:
            return None
        self._hub_asked_at[name] = self._clock()
        try:
            self._hub_paths[name] = resolve_model_path(path)
        except LLMError as error:
            self._note_fault(name, str(error))
            return None
        return self._hub_paths[name]

    def _in_folder(self) -> dict[str, Path]:
        """The folder's subdirectories with an adapter_config.json, by name. If it cannot be read, those known."""
        if self._folder is None:
            return {}
        try:
            with os.scandir(self._folder) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            self._note_fault("", f"adapter_folder {self._folder} cannot be read: {error.strerror}; is it a directory?")
            return {name: place.directory for name, place in self._places.items() if place.source is Source.FOLDER}
        self._note_mended("")
        # Links are followed now: whoever points one to another directory changes the adapter, not the old one's files.
        # `Path.resolve` would raise where links lead in a circle.
        found = {name: Path(os.path.realpath(self._folder / name)) for name in names}
        return {name: directory for name, directory in found.items() if signature_of(directory) is not None}

    def _why_not(self, name: str, num_known: int) -> str | None:
        """Why a subdirectory of this name cannot be an adapter."""
        try:
            check_client_name(name)
        except ValueError as error:
            return str(error)
        if name in self._taken_names:
            return "a model has this name; rename the directory"
        if name in self._entries:
            return "the configuration has an adapter of this name; rename the directory"
        if num_known >= self._most and name not in self._places:
            return f"there are {self._most} adapters already; raise max_known_adapters"
        return None

    def _take(self, name: str) -> None:
        """Read an adapter."""
        place = self._places[name]
        place.taken = place.seen
        try:
            digest = self._read(place.directory)
        except LLMError as error:
            self.found.pop(name, None)
            self._note_fault(name, str(error))
            return
        created = created_at(place.directory)
        self._note_mended(name)
        origin = hub_origin(self._entries[name], place.directory) if name in self._hub_paths else None
        directory = str(place.directory)
        self.found[name] = KnownAdapter(name, self._key, directory, digest, created, place.source, origin)
        logger.info("adapter %s of model %s: %s, digest %s", name, self._key, place.directory, digest)

    def _note_absent(self, name: str) -> None:
        place = self._places[name]
        place.num_absent += 1
        if place.num_absent >= _LOOKS_UNTIL_GONE:
            del self._places[name]
            self._broken.pop(name, None)
            if self.found.pop(name, None) is not None:
                logger.info("adapter %s of model %s is gone", name, self._key)

    def _note_fault(self, name: str, fault: str) -> None:
        """Log once what is wrong."""
        if self._broken.get(name) != fault:
            self._broken[name] = fault
            logger.error("the adapter %r of model %s is not served: %s", name or "folder", self._key, fault)

    def _note_mended(self, name: str) -> None:
        if self._broken.pop(name, None) is not None:
            logger.info("the adapter %s of model %s can be served again", name or "folder", self._key)
