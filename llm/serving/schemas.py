"""The public place of what goes into an engine and what comes out: all of `llm.schemas`."""

from llm.schemas import *  # noqa: F403
