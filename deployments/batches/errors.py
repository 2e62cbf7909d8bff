"""Why a request about a file or a batch is refused."""

from enum import StrEnum

from llm.errors import LLMError


class RefusalKind(StrEnum):
    """What kind of refusal it is."""

    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    """It does not fit what else there is."""
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    TOO_MANY = "too_many"


class BatchRefusedError(LLMError):
    """A request about a file or a batch that cannot be met.

    Args:
        kind: what kind of refusal it is.
        message: one line with the fix.
        param: the field at fault.
        code: the kind of error, for programs.
    """

    def __init__(self, kind: RefusalKind, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.param = param
        self.code = code


class BatchStoreAwayError(LLMError):
    """The store of files and batches cannot be read or written at the moment."""


class LeaseLostError(LLMError):
    """Another router runs the batch by now."""


def no_such_file(file_id: str, param: str | None = None) -> BatchRefusedError:
    """The error for a file that does not exist, or belongs to another key."""
    return BatchRefusedError(
        RefusalKind.NOT_FOUND, f"No such file: {file_id[:100]!r}", param=param, code="file_not_found"
    )


def no_such_batch(batch_id: str) -> BatchRefusedError:
    """The error for a batch that does not exist, or belongs to another key."""
    return BatchRefusedError(RefusalKind.NOT_FOUND, f"No such batch: {batch_id[:100]!r}", code="batch_not_found")
