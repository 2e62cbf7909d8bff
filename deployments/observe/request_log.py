"""One line in the log for each finished request: who asked, how much, for how long and where; never for what."""

import logging
from typing import Any

from deployments.observe.finished_request import FinishedRequest

logger = logging.getLogger("ray.serve")


def log_request(request: FinishedRequest, model: str) -> None:
    """Log how a request went. With Serve's `logging_config: {encoding: JSON}` each of `request_fields` is a field."""
    if not logger.isEnabledFor(logging.INFO):
        return
    fields = request_fields(request) | {"model": model}
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


def request_fields(request: FinishedRequest) -> dict[str, Any]:
    """What the log says about a finished request."""
    return {
        "request_id": request.http_request_id,
        "generation_id": request.generation_id,
        "key": request.tenant,
        "adapter": request.adapter,
        "outcome": request.error_type or request.finish_reason or "abort",
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
        "times_moved": request.num_moves,
        "phases_ms": request.timeline.phases_ms(),
    }
