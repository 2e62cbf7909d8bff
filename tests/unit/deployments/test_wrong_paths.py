"""Paths that clients put together wrongly: what they are told."""

import pytest
from in_process import ServiceFactory


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/openai/v1/responses", "/v1/responses"),
        ("POST", "/v1/chat/completions/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/openai/deployments/demo/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/chat/completion", "/v1/chat/completions"),
        ("GET", "/models", "/v1/models"),
        ("GET", "/v1/v1/models/demo", "/v1/models/demo"),
        ("HEAD", "/v1/v1/models", None),
        ("POST", "/v1/v1/messages", "/v1/messages"),
        ("POST", "/messages/count_tokens", "/v1/messages/count_tokens"),
    ],
)
async def test_the_path_that_was_meant_is_named(
    make_service: ServiceFactory, method: str, path: str, meant: str | None
):
    service = await make_service()
    answer = await service.http.request(method, path)
    assert answer.status_code == 404
    if meant is not None:
        message = answer.json()["error"]["message"]
        assert message.startswith(f"There is no route {path!r}")
        assert repr(meant) in message


@pytest.mark.parametrize("path", ["/api/tags", "/v1", "/favicon.ico", "/v1/images/generations", "/" + "x" * 5000])
async def test_nothing_is_guessed_where_nothing_is_near(make_service: ServiceFactory, path: str):
    service = await make_service()
    error = (await service.http.get(path)).json()["error"]
    assert error["code"] == "unknown_route"
    assert "did you mean" not in error["message"]
    assert len(error["message"]) < 200


async def test_a_wrong_method_is_told_the_right_one(make_service: ServiceFactory):
    service = await make_service()
    answer = await service.http.get("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "POST" in answer.json()["error"]["message"]
    answer = await service.http.post("/v1/models", json={})
    assert "GET" in answer.json()["error"]["message"]
