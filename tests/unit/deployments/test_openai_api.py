"""What the HTTP layer refuses, and in which words, without a socket."""

import hashlib
import json
from pathlib import Path

import httpx
import pytest
from in_process import ServiceFactory, emulated_config
from scripted_engine import THINK_TEMPLATE, model_config

from deployments.api.errors import ErrorResponse
from deployments.api.openai import responses
from deployments.router.keys import ApiKey

KEY = "sk-test-key"
KEYS = (ApiKey("team", hashlib.sha256(KEY.encode()).digest()),)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def check_error(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600
    if 400 <= status < 500:
        assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "no user before"}]}, "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": [f"a{i}" for i in range(65)]}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ],
)  # fmt: skip
async def test_chat_fields_are_refused_by_name(make_service: ServiceFactory, changes: dict, param: str):
    service = await make_service()
    error = check_error(await service.post("/v1/chat/completions", **{**CHAT, **changes}), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    "changes",
    [
        {
            "user": "me",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "tools": [],
            "tool_choice": "none",
        },
        {"response_format": {"type": "text"}, "modalities": ["text"], "parallel_tool_calls": True},
        {"messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "name": "me", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"max_tokens": 5, "max_completion_tokens": 5, "top_k": -1, "logit_bias": {"97": -100}, "seed": -5},
        {"n": None, "stop": None, "temperature": None, "logprobs": None, "stream": None, "stream_options": None},
    ],
)
async def test_what_clients_send_without_harm_is_accepted(make_service: ServiceFactory, changes: dict):
    service = await make_service()
    response = await service.post("/v1/chat/completions", **{**CHAT, "max_tokens": 5, **changes})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [1, 1.5]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, 100_000]}, "prompt"),
        ({"prompt": ["a"] * 10_000}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 100}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
async def test_completion_fields_are_refused_by_name(make_service: ServiceFactory, changes: dict, param: str):
    service = await make_service()
    error = check_error(await service.post("/v1/completions", **{"prompt": "a", **changes}), 400)
    assert error["param"] == param


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-99", "99", '"1"', "true", "[]"])
async def test_numbers_out_of_bounds(make_service: ServiceFactory, field: str, value: str):
    service = await make_service()
    content = f'{{"model": "demo", "prompt": "a", "{field}": {value}}}'
    response = await service.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert check_error(response, 400)["param"] == field


async def test_prompts_past_the_context_or_the_pool(make_service: ServiceFactory):
    service = await make_service()
    for prompt in ("x" * 2048, [97] * 2048, "x" * 1_000_000):
        error = check_error(await service.post("/v1/completions", prompt=prompt), 400)
        assert error["code"] == "context_length_exceeded"
    small = await make_service(emulated_config(engine={"max_batch_size": 4, "num_pages": 4}))
    error = check_error(await small.post("/v1/completions", prompt="x" * 100), 400)
    assert error["code"] == "context_length_exceeded"


async def test_max_tokens_past_the_rest_of_the_context_is_cut(make_service: ServiceFactory):
    service = await make_service(emulated_config(emulation={"tokens_per_s": 5000.0, "max_seq_len": 64}))
    body = (await service.post("/v1/completions", prompt=[97] * 50, max_tokens=60)).json()
    assert body["usage"]["completion_tokens"] == 14
    assert body["choices"][0]["finish_reason"] == "length"


async def test_bodies_that_are_not_json(make_service: ServiceFactory):
    service = await make_service()
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff\xfe", b'"text"', b"[1]", b"null", b"[" * 100_000, b'{"a":"\\ud800"}'):
        check_error(await service.http.post("/v1/completions", content=content, headers=json_type), 400)
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await service.http.post("/v1/completions", content=b"{}", headers={"content-type": content_type})
        check_error(response, 415)
    encoded = {**json_type, "content-encoding": "br"}
    check_error(await service.http.post("/v1/completions", content=b"{}", headers=encoded), 415)


async def test_bodies_and_headers_that_are_too_large(make_service: ServiceFactory):
    service = await make_service()
    json_type = {"content-type": "application/json"}
    num_read = 0

    async def endless():
        nonlocal num_read
        while True:
            num_read += 1 << 20
            yield bytes(1 << 20)

    check_error(await service.http.post("/v1/completions", content=endless(), headers=json_type), 413)
    assert num_read <= 10 << 20, "it reads on"
    check_error(await service.http.post("/v1/completions", content=bytes((8 << 20) + 1), headers=json_type), 413)
    check_error(await service.http.get("/v1/models", headers={"x-large": "x" * (64 << 10)}), 431)


async def test_unknown_routes_models_and_methods(make_service: ServiceFactory):
    service = await make_service()
    for path in ("/v1", "/v1/nothing", "/health/x", "http://server//healthy"):
        check_error(await service.http.get(path), 404)
    assert "POST" in (await service.http.get("/v1/completions")).headers["allow"]
    check_error(await service.http.get("/v1/completions"), 405)
    check_error(await service.http.put("/v1/chat/completions"), 405)
    error = check_error(await service.post("/v1/completions", prompt="a", model="other"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert check_error(await service.http.get("/v1/models/other"), 404)["code"] == "model_not_found"


async def test_models_version_docs(make_service: ServiceFactory):
    service = await make_service()
    models = (await service.http.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["demo"]
    assert (await service.http.get("/v1/models/demo")).json() == models["data"][0]
    assert models["data"][0]["max_model_len"] == 2048
    assert (await service.http.get("/version")).json()["version"]
    assert "swagger" in (await service.http.get("/docs")).text.lower()
    schema = (await service.http.get("/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    names = set(schema["components"]["schemas"])
    wanted = {part.split("/")[-1].rstrip('"') for part in json.dumps(schema).split() if "#/components/" in part}
    assert {name.rstrip('"},]') for name in wanted} <= names


async def test_tokenize_and_back(make_service: ServiceFactory):
    service = await make_service()
    body = (await service.post("/tokenize", prompt="héllo", return_token_strs=True)).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 2048
    assert (await service.post("/detokenize", tokens=body["tokens"])).json() == {"prompt": "héllo"}
    chat = (await service.post("/tokenize", **CHAT)).json()
    usage = (await service.post("/v1/chat/completions", **CHAT, max_tokens=1)).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert check_error(await service.post("/detokenize", tokens=[1, "a"]), 400)["param"] == "tokens"
    assert check_error(await service.post("/detokenize", tokens=[10**6]), 400)["param"] == "tokens"
    check_error(await service.post("/tokenize"), 400)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": TOOLS},
        {"tools": TOOLS, "tool_choice": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"messages": [*CHAT["messages"], {"role": "assistant", "content": "So"}], "continue_final_message": True,
         "add_generation_prompt": False},
    ],
)  # fmt: skip
async def test_tokenize_gives_the_prompt_of_a_chat(make_service: ServiceFactory, tmp_path: Path, fields: dict):
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    tokens = (await service.post("/tokenize", **{**CHAT, **fields})).json()["tokens"]
    chat = await service.post("/v1/chat/completions", **{**CHAT, **fields}, max_tokens=1)
    assert len(tokens) == chat.json()["usage"]["prompt_tokens"]
    plain = (await service.post("/tokenize", **CHAT)).json()["tokens"]
    assert (tokens == plain) == ("tool_choice" in fields)


async def test_tokenize_refuses_what_a_chat_would(make_service: ServiceFactory):
    service = await make_service()
    for fields, param in (
        ({"prompt": "a", "tools": TOOLS}, "tools"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({**CHAT, "tools": [*TOOLS, *TOOLS]}, "tools[1].function.name"),
        ({**CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ):
        assert check_error(await service.post("/tokenize", **fields), 400)["param"] == param


async def test_control_tokens_typed_by_a_user_stay_text(make_service: ServiceFactory):
    service = await make_service()
    plain = (await service.post("/tokenize", messages=[{"role": "user", "content": "<|end|>"}])).json()
    assert plain["tokens"].count(257) == 1, "the template's own, not the user's"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"host": "health"}, 401),
        ({"host": "localhost/health?"}, 401),
    ],
)
async def test_keys(make_service: ServiceFactory, headers: dict, status: int):
    service = await make_service(keys=KEYS)
    response = await service.http.get("/v1/models", headers=headers)
    assert response.status_code == status
    if status == 401:
        assert check_error(response, 401)["code"] == "invalid_api_key"
        assert KEY not in response.text


async def test_with_keys_every_route_is_closed_but_the_open_ones(make_service: ServiceFactory):
    service = await make_service(keys=KEYS)
    schema_paths = [route.path for route in service.api.routes]
    closed = {path for path in schema_paths if (await service.http.get(path)).status_code == 401}
    assert set(schema_paths) - closed == {"/", "/fleet", "/health", "/ready", "/openapi.json", "/docs"}
    for path in ("/nothing", "/health/../v1/models", "/health//x", "/v1/models?x=/health", "/%68ealth/x"):
        check_error(await service.http.get(path), 401)
    two = [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
    check_error(await service.http.get("/v1/models", headers=two), 401)


async def test_what_fails_inside_is_not_told(make_service: ServiceFactory, monkeypatch):
    service = await make_service()

    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(service.router, "start", fail)
    response = await service.post("/v1/completions", prompt="a")
    assert check_error(response, 500)["type"] == "server_error"
    assert "secret" not in response.text


async def test_answers_are_what_the_docs_say(make_service: ServiceFactory):
    service = await make_service()
    tokens = {"tokens": [97, 98]}
    cases = [
        (responses.ChatCompletion, await service.post("/v1/chat/completions", **CHAT, max_tokens=3)),
        (
            responses.ChatCompletion,
            await service.post("/v1/chat/completions", **CHAT, max_tokens=3, logprobs=True, top_logprobs=1),
        ),
        (responses.Completion, await service.post("/v1/completions", prompt="a", max_tokens=3, logprobs=1)),
        (responses.ModelList, await service.http.get("/v1/models")),
        (responses.ModelObject, await service.http.get("/v1/models/demo")),
        (responses.Tokens, await service.post("/tokenize", prompt="a")),
        (responses.Text, await service.post("/detokenize", **tokens)),
        (responses.Status, await service.http.get("/health")),
        (responses.Status, await service.http.get("/ready")),
        (responses.Version, await service.http.get("/version")),
        (responses.Stats, await service.http.get("/rayline/stats")),
        (ErrorResponse, await service.http.get("/nothing")),
    ]
    for model, response in cases:
        model.model_validate_json(response.content, strict=True)
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    chat = await service.post("/v1/chat/completions", **CHAT, **options, logprobs=True)
    plain = await service.post("/v1/completions", prompt="a", **options, logprobs=0)
    for model, response in ((responses.ChatCompletionChunk, chat), (responses.Completion, plain)):
        for line in response.text.split("\n\n")[:-2]:
            model.model_validate_json(line.removeprefix("data: "), strict=True)


async def test_keys_guard_the_same_routes_under_a_prefix(make_service: ServiceFactory):
    service = await make_service(keys=KEYS)
    transport = httpx.ASGITransport(service.api, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test/llm") as http:
        assert (await http.get("/health")).status_code == 200
        check_error(await http.get("/v1/models"), 401)
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})).status_code == 200
