"""`/v1/batches`: bodies and answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.api.openai.files import ExpiresAfter
from deployments.api.openai.responses import ResponseModel
from deployments.batches.line_usage import TokenUsage
from deployments.batches.records import Batch, BatchStatus
from deployments.chat.wire_model import RequestBody

MAX_METADATA = 16


class BatchRequest(RequestBody):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    """Where each line's request goes, such as `/v1/chat/completions`."""
    completion_window: str
    """How long it may take: `24h`, or any other number with `s`, `m`, `h` or `d`."""
    metadata: Annotated[
        dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
        Field(max_length=MAX_METADATA),
    ] | None = None  # fmt: skip
    output_expires_after: ExpiresAfter | None = None
    """When the files of results go."""


class BatchFault(ResponseModel):
    """Something wrong with the input file."""

    code: str
    message: str
    param: str | None
    line: int | None
    """From 1."""


class BatchFaults(ResponseModel):
    """Everything wrong with the input file, up to a hundred faults."""

    object: Literal["list"]
    data: list[BatchFault]


class RequestCounts(ResponseModel):
    """Lines of the input file."""

    total: int
    completed: int
    failed: int


class BatchInputDetails(ResponseModel):
    """Of the input tokens."""

    cached_tokens: int
    """From the prefix cache."""


class BatchOutputDetails(ResponseModel):
    """Of the output tokens."""

    reasoning_tokens: int


class BatchUsage(ResponseModel):
    """Tokens of the lines that have a result, as their answers say."""

    input_tokens: int
    input_tokens_details: BatchInputDetails
    output_tokens: int
    output_tokens_details: BatchOutputDetails
    total_tokens: int


class BatchObject(ResponseModel):
    """A batch; times in seconds since 1970."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    """The model that all lines name; None if they name several, and until they have been read."""
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    """Answers; None until the batch has ended, and if there are none."""
    error_file_id: str | None
    """Errors, and lines that were not run; as with `output_file_id`."""
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(ResponseModel):
    """Answer of `GET /v1/batches`."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> dict[str, Any]:
    """A batch, as `BatchObject` describes it."""
    record, state = batch.record, batch.state
    ended = {status: state.ended_at if state.status is status else None for status in BatchStatus if status.is_final}
    faults = [
        {"code": fault.code, "message": fault.message, "param": fault.param, "line": fault.line}
        for fault in state.faults
    ]
    return {
        "id": record.id, "object": "batch", "endpoint": record.endpoint, "model": state.model,
        "errors": {"object": "list", "data": faults} if faults else None,
        "input_file_id": record.input_file_id, "completion_window": record.completion_window, "status": batch.status,
        "output_file_id": state.output_file_id, "error_file_id": state.error_file_id,
        "created_at": record.created_at, "in_progress_at": state.in_progress_at, "expires_at": record.expires_at,
        "finalizing_at": state.finalizing_at, "completed_at": ended[BatchStatus.COMPLETED],
        "failed_at": ended[BatchStatus.FAILED], "expired_at": ended[BatchStatus.EXPIRED],
        "cancelling_at": batch.cancelling_at, "cancelled_at": ended[BatchStatus.CANCELLED],
        "request_counts": {"total": state.num_lines, "completed": state.num_completed, "failed": state.num_failed},
        "usage": _usage(state.usage), "metadata": record.metadata,
    }  # fmt: skip


def _usage(usage: TokenUsage) -> dict[str, Any]:
    """Tokens, as `BatchUsage` describes them."""
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
