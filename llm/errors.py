"""Errors that cross a boundary. Each message says what is wrong and, where there is one, the fix."""


class LLMError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LLMError):
    """A configuration file or value cannot be used. The message names the file or field and the fix."""


class CheckpointError(LLMError):
    """A checkpoint cannot be loaded: for example a missing shard, a wrong shape, or an unknown architecture."""


class AdapterChangedError(CheckpointError):
    """The files of an adapter are not those that its digest names."""


class CapacityError(LLMError):
    """There are more tokens than their memory holds: a `KVCache` is full, or a pool is too small for a prompt."""


class InvalidRequestError(LLMError):
    """A request that can never be served as asked.

    Attributes:
        param: name of the request field at fault, or None.
        code: short machine-readable reason (`context_length_exceeded`, …), or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineError(LLMError):
    """The engine failed while it ran a request; the request itself was not at fault."""


class RankLostError(EngineError):
    """A process that holds a part of the model died, hangs or failed, and the engine cannot run another step."""
