"""One line in the log for each HTTP request that has been answered, refused ones included. Never what was said, and
never a key."""

import logging

import msgspec

logger = logging.getLogger("ray.serve.audit")

_encode = msgspec.json.Encoder().encode


class AuditLine(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged of an HTTP request.

    Attributes:
        request_id: its `X-Request-ID`.
        key: name of its API key; `unknown` for a wrong one or none, "" where no keys are configured.
        role: the key's; "" for no key.
        method: of HTTP.
        route: path of the route table; "" for a path that it does not have, which might be anything.
        model: the model that was asked for; "" if none was, or there is no such model.
        status: of the answer; 499 if the client left before it began.
        reason: kind of error; "" if there was none.
        outcome: how the work ended, as in the record; "" if none began.
        client: address of the connection's other end.
    """

    request_id: str
    key: str
    role: str
    method: str
    route: str
    model: str
    status: int
    reason: str
    outcome: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    duration_ms: float
    client: str


def log_audit(line: AuditLine) -> None:
    """Log a line as a JSON object. With Serve's `logging_config: {encoding: JSON}` its parts are fields as well."""
    if logger.isEnabledFor(logging.INFO):
        fields = msgspec.structs.asdict(line)
        logger.info("audit %s", _encode(line).decode(), extra={"rayline": fields, "request_id": line.request_id})
