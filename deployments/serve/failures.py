"""Why an application does not start, out of what Ray Serve says of it."""

import re
from typing import Any

_MAX_CAUSE_CHARS = 600


def failure_of(app: Any) -> str | None:
    """Why an application that is being started will not come up, by Serve's status of it; None while it may."""
    for deployment in app.deployments.values():
        if "failed to start" in deployment.message:
            return root_cause(deployment.message)
    return root_cause(app.message) if app.status == "DEPLOY_FAILED" else None


def root_cause(text: str) -> str:
    """The exception that a traceback as text ends with: class and message; for our own errors the message alone."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = list(re.finditer(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit|Interrupt)): ", text, re.MULTILINE))
    if not found:
        return " ".join(text.split())[-_MAX_CAUSE_CHARS:]
    last = found[-1]
    message = " ".join(text[last.end() :].split())[:_MAX_CAUSE_CHARS]
    is_ours = last[0].startswith(("llm.", "deployments."))
    return message if is_ours else f"{last[1]}: {message}"
