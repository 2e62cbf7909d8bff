"""The lines of a batch's files of results, in OpenAI's format
(https://platform.openai.com/docs/api-reference/batch/request-output)."""

import msgspec

from deployments.batches.calls import LineAnswer
from deployments.batches.records import BatchStatus

_NOT_RUN = {
    BatchStatus.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired",
    ),
    BatchStatus.CANCELLED: ("batch_cancelled", "This request was not executed before the batch was canceled"),
}


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _ResultLine(msgspec.Struct):
    id: str
    custom_id: str
    response: _Response | None
    error: _Error | None


_encode = msgspec.json.encode


def line_id(batch_id: str, line: int) -> str:
    """The id of a line's request: always the same."""
    return f"batch_req_{batch_id.removeprefix('batch_')}{line:06x}"


def answered(batch_id: str, line: int, custom_id: str, answer: LineAnswer) -> bytes:
    """The line for an answer or for an error that the API has answered with."""
    body = answer.body.replace(b"\n", b" ")  # within a string, JSON has no line breaks
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except msgspec.DecodeError:
        body = _encode(answer.body.decode(errors="replace"))
    name = line_id(batch_id, line)
    return _encode(_ResultLine(name, custom_id, _Response(answer.status, name, msgspec.Raw(body)), None))


def not_run(batch_id: str, line: int, custom_id: str, ending: BatchStatus) -> bytes:
    """The line for a request that was not run because its batch ended before."""
    return _encode(_ResultLine(line_id(batch_id, line), custom_id, None, _Error(*_NOT_RUN[ending])))
