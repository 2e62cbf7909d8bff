"""What Anthropic's clients ask beside messages, and what of a tool's failure reaches the model."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import anthropic
import pytest
import uvicorn
from in_process import ServiceFactory
from starlette.types import ASGIApp

from deployments.api.anthropic.schemas import MessagesRequest

HI = {"role": "user", "content": "hi"}
USE = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {}}]}


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """The address of a real server: the SDK brings an HTTP library of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    task = asyncio.create_task(server.serve([listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def test_the_sdk_lists_models(make_service: ServiceFactory):
    service = await make_service()
    async with served(service.api) as url, anthropic.AsyncAnthropic(api_key="none", base_url=url) as client:
        page = await client.models.list(limit=5)
        assert (page.first_id, page.last_id, page.has_more) == ("demo", "demo", False)
        (model,) = [model async for model in client.models.list()]
        assert (model.id, model.type, model.display_name) == ("demo", "model", "demo")
        assert model.created_at.year >= 2025
        assert model.max_input_tokens == 2048
        assert await client.models.retrieve("demo") == model
        with pytest.raises(anthropic.NotFoundError) as raised:
            await client.models.retrieve("claude-4")
        assert raised.value.body["error"]["type"] == "not_found_error"
        assert raised.value.request_id


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"content": "boom"}, "boom"),
        ({"content": "boom", "is_error": False}, "boom"),
        ({"content": "boom", "is_error": True}, "[error]\nboom"),
        ({"content": [{"type": "text", "text": "boom"}], "is_error": True}, "[error]\nboom"),
        ({"is_error": True}, "[error]"),
    ],
)
def test_that_a_tool_failed_is_told(fields: dict, told: str):
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", **fields}]}
    request = MessagesRequest.model_validate({"model": "demo", "max_tokens": 5, "messages": [HI, USE, result]})
    assert request.to_chat().messages[-1].turn()["content"] == told


async def test_tools_in_openais_form_are_not_lost(make_service: ServiceFactory):
    service = await make_service()
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    answer = await service.post("/v1/messages", messages=[HI], max_tokens=5, tools=[tool])
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("tools[0].")
    assert "name and input_schema" in message
