"""One line in the log for each request that is over: who, how much, how long, where. Never what."""

import logging
from typing import Any

from deployments.router.generation import Generation

logger = logging.getLogger("ray.serve")


def log_request(generation: Generation) -> None:
    """Log how a request went. With Serve's `logging_config: {encoding: JSON}` each of `request_fields` is a field."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = request_fields(generation)
    logger.info(
        "request %s over: %s, %d + %d tokens%s%s",
        fields["generation_id"],
        fields["outcome"],
        fields["num_prompt_tokens"],
        fields["num_output_tokens"],
        "".join(f", {phase} {duration:.0f} ms" for phase, duration in fields["phases_ms"].items()),
        f", moved {fields['times_moved']} times" if fields["times_moved"] else "",
        extra={"rayline": fields, "request_id": fields["request_id"]},
    )


def request_fields(generation: Generation) -> dict[str, Any]:
    """What is worth knowing of a request afterwards."""
    caller = generation.group.caller
    outcome = "abort"
    if generation.error is not None:
        outcome = type(generation.error).__name__
    elif generation.end is not None:
        outcome = str(generation.end.reason)
    return {
        "request_id": caller.request_id,
        "generation_id": generation.request.request_id,
        "key": caller.tenant,
        "outcome": outcome,
        "num_prompt_tokens": len(generation.request.prompt_token_ids or ()),
        "num_output_tokens": len(generation.token_ids),
        "times_moved": generation.num_resumes,
        "phases_ms": generation.timeline.phases_ms(),
    }
