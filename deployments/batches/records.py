"""What is known of files and batches, as it is kept in the store."""

import re
import secrets
from enum import StrEnum

import msgspec

from deployments.batches.line_usage import TokenUsage

_FILE_ID = re.compile(r"file-[0-9a-f]{28}")
_BATCH_ID = re.compile(r"batch_[0-9a-f]{28}")


class Purpose(StrEnum):
    """What a file is for."""

    BATCH = "batch"
    """Requests of a batch, one a line."""
    BATCH_OUTPUT = "batch_output"
    """Answers or errors of a batch, made by the server."""


class BatchStatus(StrEnum):
    """How far a batch is."""

    VALIDATING = "validating"
    """Its file has not been checked yet."""
    FAILED = "failed"
    """Its file is wrong; see `errors`. Nothing was run."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """All lines have ended; the files of results are being written."""
    COMPLETED = "completed"
    EXPIRED = "expired"
    """Its completion window ended first; what was done by then is in the files."""
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    """As with `expired`."""

    @property
    def is_final(self) -> bool:
        """Whether nothing is done any more."""
        return self in _FINAL


_FINAL = frozenset({BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED})


class FileRecord(msgspec.Struct, frozen=True):
    """A file; times in seconds since 1970. Written once."""

    id: str
    filename: str
    purpose: Purpose
    num_bytes: int
    created_at: int
    expires_at: int


class BatchRecord(msgspec.Struct, frozen=True):
    """What was asked for; times in seconds since 1970. Written once, by whoever took the request."""

    id: str
    owner: str
    """Name of the API key that it runs for; "" if there are no keys."""
    endpoint: str
    input_file_id: str
    num_input_bytes: int
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    results_expire_after_s: int | None = None
    """None for as long as other files."""


class LineFault(msgspec.Struct, frozen=True):
    """Something wrong with the input file."""

    code: str
    message: str
    line: int | None = None
    """From 1; None for the file as a whole."""
    param: str | None = None


class BatchState(msgspec.Struct, frozen=True):
    """How far a batch is. Only the router that holds its lease writes it."""

    status: BatchStatus = BatchStatus.VALIDATING
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: TokenUsage = TokenUsage()
    """What lines with a result have used."""
    model: str | None = None
    """The model that all lines name; None if they name several, or none, and until they have been read."""
    faults: tuple[LineFault, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    ended_at: int | None = None


class Batch(msgspec.Struct, frozen=True):
    """A batch as it stands: what was asked for, how far it is, and when somebody asked to cancel it."""

    record: BatchRecord
    state: BatchState
    cancelling_at: int | None = None

    @property
    def status(self) -> BatchStatus:
        """Its status."""
        is_leaving = self.cancelling_at is not None and not self.state.status.is_final
        return BatchStatus.CANCELLING if is_leaving else self.state.status


def new_file_id(now: float) -> str:
    """An id that sorts by time and cannot be guessed."""
    return f"file-{_number(now)}"


def new_batch_id(now: float) -> str:
    """An id that sorts by time and cannot be guessed."""
    return f"batch_{_number(now)}"


def result_file_id(batch_id: str, *, is_error: bool) -> str:
    """The id of a batch's file of answers or errors. It is always the same, so writing it again replaces it."""
    number = batch_id.removeprefix("batch_")
    return f"file-{number[:-1]}{'e' if is_error else 'a'}"


def is_file_id(text: str) -> bool:
    """Whether a text looks like the id of a file; anything else is no name in the store."""
    return _FILE_ID.fullmatch(text) is not None


def is_upload_id(file_id: str) -> bool:
    """Whether a file was uploaded, and is not the result of a batch."""
    return is_file_id(file_id) and file_id.endswith("0")


def is_batch_id(text: str) -> bool:
    """Whether a text looks like the id of a batch."""
    return _BATCH_ID.fullmatch(text) is not None


def created_at_of(file_or_batch_id: str) -> float:
    """When an id was made, in seconds since 1970."""
    return int(file_or_batch_id[-28:-16], 16) / 1000


def _number(now: float) -> str:
    """Milliseconds since 1970, and 8 random bytes whose last digit is 0: see `result_file_id`."""
    return f"{int(now * 1000):012x}{secrets.token_hex(8)[:-1]}0"
