"""What goes into an engine and what comes out, shared by all its parts. Only values: no torch, no tokenizer, no Ray."""

from llm.schemas.outputs import (
    AdapterFailure,
    EngineStats,
    FinishReason,
    GenerationResult,
    StepFailure,
    StepOutput,
    TokenLogprobs,
)
from llm.schemas.requests import (
    INT64_MAX,
    AdapterRef,
    GenerationRequest,
    Grammar,
    GrammarKind,
    Pooling,
    Preamble,
    new_request_id,
    new_seed,
)

__all__ = [
    "INT64_MAX",
    "AdapterFailure",
    "AdapterRef",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "GenerationResult",
    "Grammar",
    "GrammarKind",
    "Pooling",
    "Preamble",
    "StepFailure",
    "StepOutput",
    "TokenLogprobs",
    "new_request_id",
    "new_seed",
]
