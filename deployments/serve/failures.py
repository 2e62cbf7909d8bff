"""Finds in Ray's reports why an application does not start and why a replica has ended."""

import re
from typing import Any

_MAX_CAUSE_CHARS = 600
_ENDS = (
    ("NODE_OUT_OF_MEMORY", "Ray killed its process because the node was short of memory"),
    ("node has died", "its node was lost"),
    ("killed by `ray.kill`", "Ray Serve ended its process"),
    ("SYSTEM_ERROR", "its process ended suddenly: it was killed, or crashed"),
    ("USER_ERROR", "its process ended with an error"),
    ("INTENDED", "its process was asked to end"),
    ("worker process has died", "its process ended"),
)
"""Texts in Ray's report on a dead actor, the most telling first, and what each says about the replica."""


def failure_of(app: Any) -> str | None:
    """Why a starting application will not come up, by Serve's status of it; None while it still may."""
    for deployment in app.deployments.values():
        if (cause := start_failure(deployment.message)) is not None:
            return cause
    return root_cause(app.message) if app.status == "DEPLOY_FAILED" else None


def start_failure(message: str) -> str | None:
    """Why replicas fail to start, by the message in Serve's status of their deployment; None if they do not."""
    return root_cause(message) if "failed to start" in message else None


def has_failed_repeatedly(message: str) -> bool:
    """Whether so many starts in a row have failed that Serve counts the deployment as failed."""
    return message.startswith("The deployment failed to start")


def root_cause(text: str) -> str:
    """The exception at the end of a traceback's text: class and message; for our own errors only the message."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = list(re.finditer(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Exit|Interrupt)): ", text, re.MULTILINE))
    if not found:
        return " ".join(text.split())[-_MAX_CAUSE_CHARS:]
    last = found[-1]
    message = " ".join(text[last.end() :].split())[:_MAX_CAUSE_CHARS]
    is_ours = last[0].startswith(("llm.", "deployments."))
    return message if is_ours else f"{last[1]}: {message}"


def end_of_actor(report: str) -> str:
    """How a replica ended, by Ray's report on its actor: one sentence about the replica.

    Args:
        report: the text of a `RayActorError`.
    """
    for mark, meaning in _ENDS:
        if mark in report:
            return meaning
    return "its process cannot be reached"
