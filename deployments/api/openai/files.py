"""`/v1/files`: forms and answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.api.openai.responses import ResponseModel
from deployments.batches.records import FileRecord, Purpose
from deployments.chat.errors import invalid
from deployments.chat.wire_model import WireModel

MIN_LIFETIME_S, MAX_LIFETIME_S = 3600, 30 * 24 * 3600
_MAX_FILENAME_CHARS = 255


class ExpiresAfter(WireModel):
    """When files go."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)]


class FileUpload(WireModel):
    """Form of `POST /v1/files`."""

    file: bytes
    """Requests of a batch, one a line."""
    purpose: Literal["batch"]


class FileObject(ResponseModel):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """Seconds since 1970."""
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None


class FileList(ResponseModel):
    """Answer of `GET /v1/files`."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(ResponseModel):
    """Answer of `DELETE /v1/files/{file_id}`."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


def file_object(record: FileRecord) -> dict[str, Any]:
    """A file, as `FileObject` describes it."""
    return {
        "id": record.id, "object": "file", "bytes": record.num_bytes, "created_at": record.created_at,
        "expires_at": record.expires_at, "filename": record.filename, "purpose": record.purpose,
        "status": "processed", "status_details": None,
    }  # fmt: skip


def check_purpose(fields: dict[str, str]) -> None:
    """Refuse a form whose file is for something else.

    Raises:
        APIError: a 400.
    """
    if fields.get("purpose") != Purpose.BATCH:
        raise invalid("purpose: must be batch; this server takes files for batches only", "purpose")


def lifetime_s(fields: dict[str, str]) -> int | None:
    """How long a form asks for its file to be kept; None if it does not say.

    Raises:
        APIError: a 400.
    """
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid("expires_after[anchor]: must be created_at", "expires_after[anchor]")
    if not (seconds is not None and seconds.isascii() and seconds.isdigit() and len(seconds) < 10
            and MIN_LIFETIME_S <= int(seconds) <= MAX_LIFETIME_S):  # fmt: skip
        raise invalid(
            f"expires_after[seconds]: must be a number from {MIN_LIFETIME_S} to {MAX_LIFETIME_S}",
            "expires_after[seconds]",
        )
    return int(seconds)


def plain_filename(name: str) -> str:
    """A file's name as it is kept: without folders, control characters and excess length."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(char for char in last if char.isprintable())[:_MAX_FILENAME_CHARS]
