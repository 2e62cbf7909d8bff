"""Calls to the deployments that routers share, each with one replica."""

import asyncio
import contextvars
from typing import Any

from deployments.fleet.engine_client import is_being_cancelled
from llm.errors import LLMError


async def call(method: Any, *arguments: Any, away: type[LLMError], timeout_s: float | None = None) -> Any:
    """Call a deployment and return its answer.

    Args:
        method: the method of the deployment's handle to call.
        away: what to raise where the deployment cannot be reached, is being replaced, or takes too long.
        timeout_s: longest time to wait; None for no limit.
    """
    import grpc  # type: ignore[import-untyped]
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    # Outside any HTTP request's context, as in `ServeEngineClient`.
    response = contextvars.Context().run(method.remote, *arguments)
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except TimeoutError:
        response.cancel()
        raise away(f"it did not answer within {timeout_s:g} s") from None
    except asyncio.CancelledError:
        if not is_being_cancelled():  # canceled at the other end: the deployment is being removed
            raise away("it is being replaced") from None
        response.cancel()
        raise
    except (RayError, RayServeException, grpc.RpcError) as error:
        raise away(f"it cannot be reached: {type(error).__name__}") from error
