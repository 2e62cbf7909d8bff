"""The handlers for `/v1/files`."""

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from deployments.api.answering import json_response
from deployments.api.batch_desk import DeskAccess, list_object, page_of
from deployments.api.byte_ranges import part_of
from deployments.api.callers import tenant_of
from deployments.api.openai.files import (
    DeletedFile,
    FileList,
    FileObject,
    FileUpload,
    check_purpose,
    file_object,
    lifetime_s,
    plain_filename,
)
from deployments.api.route_table import Route
from deployments.api.uploads import Form, read_form
from deployments.batches.desk import BatchDesk
from deployments.batches.file_shelf import Upload
from deployments.batches.records import FileRecord, Purpose, is_file_id
from deployments.chat.errors import invalid
from deployments.config import LimitsConfig

_ONE = "/v1/files/{file_id}"
_MAX_PAGE = 10_000
_CHUNK_BYTES = 1 << 20


class FileEndpoints:
    """Takes, lists, returns and deletes the files of each API key.

    Args:
        desk: where they are kept; None for nowhere.
        limits: bounds on what clients may do.
    """

    def __init__(self, desk: BatchDesk | None, limits: LimitsConfig) -> None:
        self._access = DeskAccess(desk)
        self._limits = limits

    def table(self) -> list[Route]:
        """The routes of this class."""
        return [
            Route("POST", "/v1/files", self.upload, "A file for a batch", FileObject, FileUpload,
                  body_type="multipart/form-data"),
            Route("GET", "/v1/files", self.list_files, "Files", FileList),
            Route("GET", f"{_ONE}/content", self.content, "What a file holds", "application/octet-stream"),
            Route("GET", _ONE, self.read, "A file", FileObject),
            Route("DELETE", _ONE, self.delete, "Delete a file", DeletedFile),
        ]  # fmt: skip

    async def upload(self, request: Request) -> Response:
        """Take a file, as a form with the fields `file` and `purpose`."""
        access, owner = self._access, tenant_of(request)
        files = access.desk.files
        upload = await access.run(lambda: files.begin(owner))
        try:
            form, expires_after_s = await self._receive(request, upload)
            name = plain_filename(form.filename or "")
            record = await access.run(lambda: upload.keep(name, Purpose.BATCH, expires_after_s))
        except BaseException:
            await access.run(upload.abort)
            raise
        return json_response(file_object(record))

    async def _receive(self, request: Request, upload: Upload) -> tuple[Form, int | None]:
        """Read the whole form, and write the file's content to the store as it arrives."""
        buffer = bytearray()

        async def flush() -> None:
            data = bytes(buffer)
            buffer.clear()
            await self._access.run(lambda: upload.write(data))

        async def write(data: bytes) -> None:
            buffer.extend(data)
            if len(buffer) >= _CHUNK_BYTES:
                await flush()

        form = await read_form(request, write, self._limits.body_timeout_s)
        if form.filename is None:
            raise invalid("Missing required field 'file'", "file", "missing_required_parameter")
        check_purpose(form.fields)
        expires_after_s = lifetime_s(form.fields)
        await flush()
        return form, expires_after_s

    async def list_files(self, request: Request) -> Response:
        """List files, the newest first."""
        page = page_of(request, is_file_id, default=_MAX_PAGE, most=_MAX_PAGE)
        owner, purpose = tenant_of(request), request.query_params.get("purpose") or None
        files = self._access.desk.files
        records, has_more = await self._access.run(lambda: files.page(owner, page, purpose))
        return json_response(list_object([file_object(record) for record in records], has_more=has_more))

    async def read(self, request: Request) -> Response:
        """Describe a file."""
        return json_response(file_object(await self._find(request)))

    async def content(self, request: Request) -> Response:
        """Return what a file holds, or the part of it that the request's `Range` asks for."""
        record = await self._find(request)
        tag = f'"{record.id}"'  # a file never changes
        part = part_of(request.headers, record.num_bytes, tag) if request.method == "GET" else None
        start, end = (part.start, part.end) if part is not None else (0, record.num_bytes)
        headers = {"Content-Length": str(record.num_bytes)} if part is None else part.headers()
        return StreamingResponse(
            self._pieces(record.id, start, end),
            status_code=200 if part is None else 206,
            headers={"Accept-Ranges": "bytes", "ETag": tag, **headers},
            media_type="application/octet-stream",
        )

    async def delete(self, request: Request) -> Response:
        """Delete a file that no batch needs."""
        owner, file_id = tenant_of(request), request.path_params["file_id"]
        ledger = self._access.desk.ledger
        await self._access.run(lambda: ledger.delete_file(owner, file_id))
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def _find(self, request: Request) -> FileRecord:
        owner, file_id = tenant_of(request), request.path_params["file_id"]
        files = self._access.desk.files
        return await self._access.run(lambda: files.get(owner, file_id))

    async def _pieces(self, file_id: str, first: int, last: int) -> AsyncIterator[bytes]:
        files = self._access.desk.files
        for start in range(first, last, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, last)
            yield await self._access.run(lambda start=start, end=end: files.read(file_id, start, end))  # type: ignore[misc]
