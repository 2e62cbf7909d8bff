"""Every bad input gets its answer over real HTTP, and the server is as well afterwards as before."""

import contextlib
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import Server

JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(**changes: Any) -> dict[str, Any]:
    return {"path": CHAT, "json": {"model": "demo", "messages": USER, **changes}}


def completion(**changes: Any) -> dict[str, Any]:
    return {"path": COMPLETIONS, "json": {"model": "demo", "prompt": "hi", **changes}}


def embedding(**changes: Any) -> dict[str, Any]:
    return {"path": "/v1/embeddings", "json": {"model": "demo", "input": "hi", **changes}}


def rerank(**changes: Any) -> dict[str, Any]:
    return {"path": "/v1/rerank", "json": {"model": "demo", "query": "hi", "documents": ["ho"], **changes}}


def raw(content: bytes | Iterator[bytes], path: str = CHAT, **headers: str) -> dict[str, Any]:
    return {"path": path, "content": content, "headers": {**JSON, **headers}}


def number(field: str, value: str) -> dict[str, Any]:
    return raw(f'{{"model": "demo", "messages": [{{"role": "user", "content": "a"}}], "{field}": {value}}}'.encode())


def with_schema(schema: object) -> dict[str, Any]:
    wanted = {"name": "a", "schema": schema, "strict": True}
    return chat(response_format={"type": "json_schema", "json_schema": wanted})


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def nine_megabytes() -> Iterator[bytes]:
    for _ in range(9):
        yield bytes(1 << 20)


CASES: dict[str, tuple[int, str | None, dict[str, Any]]] = {
    # 1: bodies
    "invalid JSON": (400, None, raw(b'{"model": ')),
    "not UTF-8": (400, None, raw(b"\xff\xfe\x00")),
    "empty": (400, None, raw(b"")),
    "top-level array": (400, None, raw(b"[1, 2]")),
    "top-level string": (400, None, raw(b'"text"')),
    "wrong content type": (415, None, {"path": CHAT, "content": b"{}", "headers": {"content-type": "text/plain"}}),
    "over 8 MB": (413, None, raw(bytes(9 << 20))),
    # 3: names
    "unknown model": (404, "model", chat(model="other")),
    "unknown route": (404, None, {"path": "/v1/nothing", "json": {}}),
    "wrong method": (405, None, {"path": "/v1/models", "json": {}}),
    # 4: messages
    "messages missing": (400, "messages", {"path": CHAT, "json": {"model": "demo"}}),
    "messages empty": (400, "messages", chat(messages=[])),
    "unknown role": (400, "messages[0].role", chat(messages=[{"role": "wizard", "content": "hi"}])),
    "content a number": (400, "messages[0].content", chat(messages=[{"role": "user", "content": 5}])),
    "content an object": (400, "messages[0].content", chat(messages=[{"role": "user", "content": {"a": 1}}])),
    "an image part": (
        400,
        "messages[0].content",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x.y/z"}}]}]),
    ),
    "role order": (400, "messages", chat(messages=[{"role": "assistant", "content": "hi"}])),
    # 5: prompts
    "prompt empty": (400, "prompt", completion(prompt="")),
    "prompt empty list": (400, "prompt", completion(prompt=[])),
    "ids negative": (400, "prompt", completion(prompt=[1, -1])),
    "ids past the vocabulary": (400, "prompt", completion(prompt=[10**6])),
    "ids boolean": (400, "prompt", completion(prompt=[True])),
    "ids fractional": (400, "prompt", completion(prompt=[1.5])),
    "10,000 prompts": (400, "prompt", completion(prompt=["a"] * 10_000)),
    # 6: lengths
    "prompt at the context": (400, "prompt", completion(prompt=[97] * 2048)),
    "prompt over the context": (400, "messages", chat(messages=[{"role": "user", "content": "a " * 5000}])),
    "one word of 7 MB": (400, "messages", chat(messages=[{"role": "user", "content": "a" * (7 << 20)}])),
    "one word of 10 MB": (413, None, chat(messages=[{"role": "user", "content": "a" * (10 << 20)}])),
    # 7: limits
    **{f"max_tokens {value}": (400, "max_tokens", number("max_tokens", value))
       for value in ("0", "-1", "1e18", "1000000000000000000", '"5"', "true", "1.5")},
    "limits differ": (400, "max_completion_tokens", chat(max_tokens=5, max_completion_tokens=6)),
    # 8: sampling
    **{f"{field} {value}": (400, field, number(field, value))
       for field, values in {
           "n": ("0", "129"),
           "temperature": ("NaN", "Infinity", "-0.1", "2.1"),
           "top_p": ("-0.1", "1.1"),
           "top_k": ("-2",),
           "min_p": ("2",),
           "presence_penalty": ("2.1", "-2.1"),
           "frequency_penalty": ("2.1", "-2.1"),
           "repetition_penalty": ("0",),
       }.items()
       for value in values},
    "best_of below n": (400, "best_of", completion(best_of=1, n=2)),
    "best_of over 20": (400, "best_of", completion(best_of=21)),
    # 9: the rest
    "65 stops": (400, "stop", chat(stop=[f"a{i}" for i in range(65)])),
    "stop empty": (400, "stop", chat(stop="")),
    "stop of 1 MB": (400, "stop", chat(stop="a" * (1 << 20))),
    "top_logprobs 21": (400, "top_logprobs", chat(logprobs=True, top_logprobs=21)),
    "top_logprobs alone": (400, "top_logprobs", chat(top_logprobs=2)),
    "completions logprobs 6": (400, "logprobs", completion(logprobs=6)),
    "seed past int64": (400, "seed", chat(seed=2**63)),
    # 10: formats
    "response_format unknown": (400, "response_format.type", chat(response_format={"type": "yaml"})),
    "json_schema without a schema": (400, "response_format.json_schema", chat(response_format={"type": "json_schema"})),
    "an invalid schema": (400, "response_format", with_schema({"type": "wizard"})),
    "a remote $ref": (400, "response_format", with_schema({"$ref": "http://127.0.0.1:1/schema.json"})),
    "a file as $ref": (400, "response_format", with_schema({"$ref": "file:///etc/passwd"})),
    "150 levels deep": (400, None, with_schema(nested(150))),
    "a bad regex": (400, "guided_regex", chat(guided_regex="([")),
    "a bad grammar": (400, "guided_grammar", chat(guided_grammar="start: nothing")),
    "two formats": (400, "response_format", chat(guided_regex="a", response_format={"type": "json_object"})),
    # 11: tools
    "a bad tool name": (400, "tools[0].function.name", chat(tools=[tool("no spaces")])),
    "double tools": (400, "tools[1].function.name", chat(tools=[tool("a"), tool("a")], tool_choice="required")),
    "bad parameters": (400, "tools[0].function.parameters", chat(tools=[tool("a", {"type": "string"})])),
    "a schema of parameters that is none": (
        400, "tools", chat(tools=[tool("a", {"properties": {"x": {"type": 5}}})], tool_choice="required")),
    "a tool_choice of none of them": (
        400, "tool_choice", chat(tools=[tool("a")], tool_choice={"type": "function", "function": {"name": "b"}})),
    "the answer of a tool that nobody called": (
        400, "messages[1].tool_call_id", chat(messages=[*USER, {"role": "tool", "tool_call_id": "x", "content": "y"}])),
    # the same through the other API of OpenAI's
    "a response to nothing": (400, "input", {"path": "/v1/responses", "json": {"model": "demo", "input": []}}),
    "a stored response": (400, "previous_response_id", {
        "path": "/v1/responses", "json": {"model": "demo", "input": "a", "previous_response_id": "resp_1"}}),
    # vectors and scores
    "no input to embed": (400, "input", embedding(input=[])),
    "dimensions of another model": (400, "dimensions", embedding(dimensions=3)),
    "dimensions below one": (400, "dimensions", embedding(dimensions=0)),
    "a prompt that the model lacks": (400, "prompt_name", embedding(prompt_name="query")),
    "an unknown pooling": (400, "pooling", embedding(pooling="cls")),
    "no documents": (400, "documents", rerank(documents=[])),
    "a document that is none": (400, "documents[1]", rerank(documents=["a", 5])),
    "a document without a text": (400, "documents[0].text", rerank(documents=[{"title": "a"}])),
    "too many documents": (400, "documents", rerank(documents=["a"] * 3000)),
    "a document past the context": (400, "documents", rerank(documents=["a" * 100_000])),
    "a query of many": (400, "query", rerank(query=["a", "b"])),
    "a negative top_n": (400, "top_n", rerank(top_n=-1)),
    "an instruction for vectors": (400, "instruction", rerank(instruction="Is it so?")),
    "another model's documents": (404, "model", rerank(model="other")),
    "half a pair": (400, "text_2", {"path": "/v1/score", "json": {"model": "demo", "text_1": "a"}}),
    "two with three": (
        400, "text_1", {"path": "/score", "json": {"model": "demo", "text_1": ["a", "b"], "text_2": ["a", "b", "c"]}}),
    "a session of a thousand characters": (400, "prompt_cache_key", chat(prompt_cache_key="s" * 1000)),
    # 12
    "chat_template": (400, "chat_template", chat(chat_template="{{ 1 }}")),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def healthy_afterwards(server: Server):
    server.check_healthy()
    pids_before = server.stats()["replicas"].keys()
    yield
    server.check_healthy()
    assert server.stats()["replicas"].keys() == pids_before, "a replica was restarted"


def check(server: Server, response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 600, "it repeats the input"
    assert server.ask() == "42"
    server.wait_for(lambda: server.num_used_pages() == 0, what="pages are still in use")


@pytest.mark.parametrize("name", CASES)
def test_bad_input(server: Server, name: str):
    status, param, request = CASES[name]
    response = server.http.post(request.pop("path"), **request)
    check(server, response, status, param)


def test_chunked_body_over_8_mb(server: Server):
    check(server, server.http.post(CHAT, content=nine_megabytes(), headers=JSON), 413, None)


def test_headers_over_64_kb(server: Server):
    check(server, server.http.get("/v1/models", headers={"x-large": "x" * (65 << 10)}), 431, None)


def test_a_crafted_host_header_changes_nothing(server: Server):
    """Above all no redirect to where it says, which careless slashes might lead to."""
    for host, path in itertools.product(("evil.example", "localhost/../health", "a b"), ("/v1/models/", "/nowhere/")):
        response = server.http.get(path, headers={"host": host})
        assert response.status_code in ((200, 400) if path == "/v1/models/" else (400, 404))
        assert "location" not in response.headers
        assert "evil" not in response.text


def test_half_a_request_then_silence_holds_nothing_up(server: Server):
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'{"model"')
        assert server.ask() == "42"


def test_clients_that_never_read(server: Server):
    """Others are served beside them, and what they asked for ends, cut off or not. F21 of the chaos suite times it."""
    url = urlsplit(server.url)
    body = json.dumps(
        {"model": "demo", "prompt": "a", "max_tokens": 500, "logprobs": 5, "ignore_eos": True, "stream": True}
    ).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((url.hostname, url.port))
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
        server.wait_for(lambda: server.num_used_pages() > 0, what="they did not begin")
        assert server.ask() == "42"
        server.wait_while_generating()


def test_a_burst_of_bad_and_good(server: Server):
    """Bad ones in between change nothing for the good ones."""
    bad = itertools.cycle([name for name in CASES if "MB" not in name and "10,000" not in name])
    for _ in range(5):
        for _ in range(5):
            _, _, request = CASES[next(bad)]
            server.http.post(request.get("path", CHAT), content=json.dumps({"model": "demo"}), headers=JSON)
        assert server.ask("What is 2 + 3?") == "5"
