"""Which session a request belongs to: one place reads it from the header or the body, for every API."""

from collections.abc import Callable

import pytest
from in_process import Service, ServiceFactory

from deployments.router.caller import Caller
from deployments.router.group import GenerationGroup
from llm.serving.schemas import GenerationRequest

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/messages": CHAT,
    "/v1/embeddings": {"input": "a"},
}
WITH_KEY = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


@pytest.fixture
async def service(make_service: ServiceFactory) -> Service:
    return await make_service()


@pytest.fixture
def sessions(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sessions of the requests that the router has begun."""
    seen: list[str] = []
    start: Callable[..., GenerationGroup] = service.router.journal.start

    def watched(requests: list[GenerationRequest], caller: Caller, *others: object) -> GenerationGroup:
        seen.append(caller.session_id)
        return start(requests, caller, *others)

    monkeypatch.setattr(service.router.journal, "start", watched)
    return seen


async def ask(service: Service, path: str, session: str | None = None, **fields: object) -> int:
    headers = {"X-Session-Id": session} if session is not None else {}
    body = {"model": "demo", **BODIES[path], **fields}
    return (await service.http.post(path, json=body, headers=headers)).status_code


@pytest.mark.parametrize("path", BODIES)
async def test_every_api_reads_the_header(service: Service, sessions: list[str], path: str):
    assert await ask(service, path, "a session") == 200
    assert await ask(service, path) == 200
    assert sessions == ["a session", ""]


@pytest.mark.parametrize("path", WITH_KEY)
async def test_openais_apis_read_the_body_too_and_the_header_counts_first(
    service: Service, sessions: list[str], path: str
):
    assert await ask(service, path, prompt_cache_key="from the body") == 200
    assert await ask(service, path, "from the header", prompt_cache_key="from the body") == 200
    assert await ask(service, path, "  ", prompt_cache_key="from the body") == 200
    assert await ask(service, path, prompt_cache_key=None) == 200
    assert sessions == ["from the body", "from the header", "from the body", ""]


async def test_a_name_is_bounded(service: Service, sessions: list[str]):
    path = "/v1/chat/completions"
    assert await ask(service, path, "s" * 512, prompt_cache_key="s" * 512) == 200
    assert await ask(service, path, "s" * 513) == 400
    assert await ask(service, path, prompt_cache_key="s" * 513) == 400
    assert await ask(service, path, prompt_cache_key=7) == 400
    assert len(sessions) == 1
