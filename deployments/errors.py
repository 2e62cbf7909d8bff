"""What can go wrong between a router and its replicas."""

from llm.errors import LLMError


class ReplicaLostError(LLMError):
    """The replica that ran a call died or was taken away; another one may continue the call."""


class OverloadedError(LLMError):
    """More work waits than can be started in time; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoReplicaError(LLMError):
    """There has been no engine replica for too long."""


class ShuttingDownError(LLMError):
    """The server is about to stop."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down")


class DeadlineError(LLMError):
    """The client's deadline has passed."""


class AccountantAwayError(LLMError):
    """The accountant that knows what an API key may still use cannot be reached."""


class KeyRevokedError(LLMError):
    """The API key of a request was revoked while the request was open."""


class StoreAwayError(LLMError):
    """Stored responses cannot be read or written."""


class RecordAwayError(LLMError):
    """The record of usage cannot be reached."""


class AdapterUnavailableError(LLMError):
    """An engine could not load a request's adapter; `code` says why."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class CatalogAwayError(LLMError):
    """The catalog of adapters cannot be reached."""
