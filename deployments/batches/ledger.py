"""`BatchLedger`: the batches of each API key, and which of them are unfinished.

In the store: `batches/KEY/BATCH/record` is what was asked for, `…/state-LEASE` how far it is, `…/cancel` that somebody
wants it to end. A router that has lost the batch and does not know it yet writes a state with a lower number than the
present holder, which nobody reads. `active/BATCH` exists until nothing is left to do for the batch; whoever runs
batches finds them by it.
"""

import re
from collections.abc import Callable

import msgspec

from deployments.batches.errors import BatchRefusedError, RefusalKind, no_such_batch
from deployments.batches.file_shelf import FileShelf, Page, folder_of
from deployments.batches.records import (
    Batch,
    BatchRecord,
    BatchState,
    Purpose,
    created_at_of,
    is_batch_id,
    new_batch_id,
)
from deployments.batches.store import Store, read_record
from deployments.batches_config import BatchesConfig

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_ACTIVE = "active"
_STATE = "state-"
_ORPHAN_AGE_S = 3600.0
_encode = msgspec.json.encode
_decode_record = msgspec.json.Decoder(BatchRecord).decode
_decode_time = msgspec.json.Decoder(int).decode
_decode_state = msgspec.json.Decoder(BatchState).decode


class ActiveBatch(msgspec.Struct, frozen=True):
    """A batch that is not finished, as it stands in the folder of these."""

    id: str
    owner: str
    input_file_id: str


_decode_active = msgspec.json.Decoder(ActiveBatch).decode


class BatchLedger:
    """Knows all batches. All methods block.

    Args:
        store: where they are kept.
        files: the files that they are made of.
        config: bounds.
        clock: seconds since 1970.
    """

    def __init__(self, store: Store, files: FileShelf, config: BatchesConfig, clock: Callable[[], float]) -> None:
        self._store = store
        self._files = files
        self._config = config
        self._clock = clock

    def create(
        self, owner: str, *, input_file_id: str, endpoint: str, completion_window: str,
        metadata: dict[str, str] | None = None, results_expire_after_s: int | None = None,
    ) -> Batch:  # fmt: skip
        """Begin a batch.

        Raises:
            BatchRefusedError: the file does not exist or is not for batches, the window is wrong, or this key has too
                many unfinished batches.
        """
        window_s = self._window_s(completion_window)
        file = self._files.get(owner, input_file_id, "input_file_id")
        if file.purpose != Purpose.BATCH:
            raise BatchRefusedError(
                RefusalKind.INVALID, f"input_file_id: {file.id} is for {file.purpose}; upload it with purpose=batch",
                param="input_file_id", code="invalid_purpose",
            )  # fmt: skip
        self._check_number(owner)
        now = self._clock()
        record = BatchRecord(
            new_batch_id(now), owner, endpoint, input_file_id, file.num_bytes, completion_window, int(now),
            int(now + window_s), metadata, results_expire_after_s,
        )  # fmt: skip
        # First the entry by which it is found: a record without one would stay as it is for ever.
        self._store.write(f"{_ACTIVE}/{record.id}", _encode(ActiveBatch(record.id, owner, input_file_id)))
        self._store.write(f"{_folder(owner, record.id)}/record", _encode(record))
        return Batch(record, BatchState())

    def get(self, owner: str, batch_id: str) -> Batch:
        """A batch as it stands.

        Raises:
            BatchRefusedError: there is no such batch, or it is another key's.
        """
        found = self._find(owner, batch_id) if is_batch_id(batch_id) else None
        if found is None:
            raise no_such_batch(batch_id)
        return found

    def page(self, owner: str, page: Page) -> tuple[list[Batch], bool]:
        """A page of an API key's batches, and whether there are more."""
        ids = page.ids(self._ids(f"batches/{folder_of(owner)}"))
        found = [
            batch for batch in (self._find(owner, batch_id) for batch_id in ids[: page.limit]) if batch is not None
        ]
        return found, len(ids) > page.limit

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """Ask for a batch to end. It has no effect on one that is cancelled already.

        Raises:
            BatchRefusedError: there is no such batch, or it has ended otherwise.
        """
        batch = self.get(owner, batch_id)
        if batch.cancelling_at is None and batch.status.is_final:
            raise BatchRefusedError(
                RefusalKind.CONFLICT, f"A batch that is {batch.status} cannot be canceled", code="batch_ended"
            )
        self._store.create(f"{_folder(owner, batch_id)}/cancel", _encode(int(self._clock())))
        return self.get(owner, batch_id)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Delete a file, unless a batch still needs it.

        Raises:
            BatchRefusedError: a batch needs it; or there is no such file, or it is another key's.
        """
        for active in self.all_active():
            if (active.owner, active.input_file_id) == (owner, file_id):
                raise BatchRefusedError(
                    RefusalKind.CONFLICT,
                    f"{active.id} still reads this file; cancel the batch first",
                    code="file_in_use",
                )
        self._files.delete(owner, file_id)

    def active_ids(self) -> list[str]:
        """Ids of all unfinished batches, the oldest first."""
        return self._ids(_ACTIVE)

    def active(self, batch_id: str) -> ActiveBatch | None:
        """An unfinished batch; None if it has just ended."""
        return read_record(self._store, f"{_ACTIVE}/{batch_id}", _decode_active)

    def all_active(self) -> list[ActiveBatch]:
        """All unfinished batches, the oldest first."""
        found = (self.active(batch_id) for batch_id in self.active_ids())
        return [active for active in found if active is not None]

    def unfinished(self, page: Page) -> tuple[list[Batch], bool]:
        """A page of the unfinished batches of all keys, and whether there are more."""
        ids = page.ids(self.active_ids())
        entries = [self.active(batch_id) for batch_id in ids[: page.limit]]
        found = [self.find(entry) for entry in entries if entry is not None]
        return [batch for batch in found if batch is not None], len(ids) > page.limit

    def find(self, active: ActiveBatch) -> Batch | None:
        """An unfinished batch; None if it has no record, which is the case for a moment while it is made."""
        return self._find(active.owner, active.id)

    def has(self, batch: BatchRecord) -> bool:
        """Whether the store has a batch, as it does unless the store itself is away."""
        return self._find(batch.owner, batch.id) is not None

    def is_cancelled(self, batch: BatchRecord) -> bool:
        """Whether somebody has asked for a batch to end."""
        return self._cancelling_at(batch.owner, batch.id) is not None

    def save(self, batch: BatchRecord, state: BatchState, lease_number: int) -> None:
        """Note how far a batch is. Only the holder of its lease may."""
        self._store.write(f"{_folder(batch.owner, batch.id)}/{_STATE}{lease_number:08d}", _encode(state))

    def strike_off(self, batch_id: str) -> None:
        """Note that nothing is left to do for a batch."""
        self._store.delete(f"{_ACTIVE}/{batch_id}")

    def sweep(self) -> None:
        """Delete batches that ended long ago, and what is left of batches that were never made."""
        at_work = self._store.names("work")  # before the active ones, which are noted before work on them begins
        active = set(self.active_ids())
        for entry in self.all_active():
            if self.find(entry) is None and self._clock() - created_at_of(entry.id) > _ORPHAN_AGE_S:
                self.strike_off(entry.id)
        longest_s = self._config.retention_s + self._config.max_window_s
        for folder in self._store.names("batches"):
            for batch_id in self._ids(f"batches/{folder}"):
                if batch_id not in active and self._clock() - created_at_of(batch_id) > longest_s:
                    self._delete_all(f"batches/{folder}/{batch_id}")
        for batch_id in at_work:
            if batch_id not in active:
                self._delete_all(f"work/{batch_id}/lease")
                self._delete_all(f"work/{batch_id}/parts")

    def _ids(self, folder: str) -> list[str]:
        """Ids of the batches in a folder, in which others may leave something, as network file systems do."""
        return [name for name in self._store.names(folder) if is_batch_id(name)]

    def _delete_all(self, folder: str) -> None:
        for name in self._store.names(folder):
            self._store.delete(f"{folder}/{name}")

    def _window_s(self, window: str) -> int:
        match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", window)
        seconds = int(match[1]) * _UNITS[match[2]] if match is not None else 0
        if not 1 <= seconds <= self._config.max_window_s:
            raise BatchRefusedError(
                RefusalKind.INVALID, "completion_window: must be a number and a unit, such as 24h or 90m, of at most "
                f"{self._config.max_window_s:.0f} s", param="completion_window", code="invalid_completion_window",
            )  # fmt: skip
        return seconds

    def _check_number(self, owner: str) -> None:
        most = self._config.max_batches_per_key
        if sum(1 for active in self.all_active() if active.owner == owner) >= most:
            raise BatchRefusedError(
                RefusalKind.TOO_MANY, f"This API key has {most} unfinished batches; wait for one to end, or cancel one",
                code="too_many_batches",
            )  # fmt: skip

    def _find(self, owner: str, batch_id: str) -> Batch | None:
        folder = _folder(owner, batch_id)
        record = read_record(self._store, f"{folder}/record", _decode_record)
        if record is None:
            return None
        states = [name for name in self._store.names(folder) if name.startswith(_STATE)]
        state = read_record(self._store, f"{folder}/{max(states)}", _decode_state) if states else BatchState()
        return Batch(record, state, self._cancelling_at(owner, batch_id)) if state is not None else None

    def _cancelling_at(self, owner: str, batch_id: str) -> int | None:
        return read_record(self._store, f"{_folder(owner, batch_id)}/cancel", _decode_time)


def _folder(owner: str, batch_id: str) -> str:
    return f"batches/{folder_of(owner)}/{batch_id}"
