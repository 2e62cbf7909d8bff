"""`/pooling` in vLLM's form, and texts that are cut where a request allows it."""

import base64
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from in_process import Service, ServiceFactory
from test_key_limits import KEY, bearer, key
from vector_checkpoints import embedder, make_checkpoint, service_config

from deployments.api.pooling import PoolingResponse

CLOSE = 1e-5
RARE = "quick brown foxes"
"""A text of many tokens."""
LONG = "gravity attracts two bodies " * 400
PATHS = ["/v1/embeddings", "/pooling"]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of vectors that puts a token behind each text, from which it makes the vector."""
    files = embedder({"pooling_mode_lasttoken": True}, prompts={"query": "find: "})
    return make_checkpoint(tmp_path_factory.mktemp("vectors"), files, ending="<|endoftext|>", is_matryoshka=True)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("labels"), labels=["calm", "happy", "sad"])


@pytest.fixture
async def service(make_service: ServiceFactory, vectors: Path) -> Service:
    return await make_service(service_config(vectors))


async def found(service: Service, path: str = "/pooling", **fields: object) -> list[list[float]]:
    """What each input of a request gives."""
    response = await service.post(path, **fields)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    if path == "/pooling":
        PoolingResponse.model_validate_json(response.content, strict=True)
    return [entry.get("data", entry.get("embedding", entry.get("probs"))) for entry in data]


async def test_vectors_are_those_of_embeddings(service: Service):
    for fields in (
        {"input": "a"},
        {"input": ["a", "b"], "task": "embed"},
        {"input": [[5, 6], [7]]},
        {"input": "a", "dimensions": 8},
        {"input": "a", "prompt_name": "query", "pooling": "mean"},
    ):
        expected = await found(service, "/v1/embeddings", **{**fields, "task": None})
        assert np.array(await found(service, **fields)) == pytest.approx(np.array(expected), abs=CLOSE)
    (encoded,) = await found(service, input="a", encoding_format="base64")
    (plain,) = await found(service, input="a")
    assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == pytest.approx(plain, abs=CLOSE)


async def test_classifiers_give_the_numbers_of_their_labels(make_service: ServiceFactory, labels: Path):
    service = await make_service(service_config(labels))
    for fields in ({"input": ["a", "b"]}, {"input": "a", "use_activation": False}):
        expected = await found(service, "/v1/classify", **fields)
        for task in ({}, {"task": "classify"}):
            assert np.array(await found(service, **fields, **task)) == pytest.approx(np.array(expected), abs=CLOSE)
    for fields, param in (
        ({"task": "embed"}, "task"),
        ({"dimensions": 2}, "dimensions"),
        ({"pooling": "mean"}, "pooling"),
    ):
        response = await service.post("/pooling", input="a", **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": LONG}, "input"),
        ({"task": "classify"}, "task"),
        ({"task": "token_embed"}, "task"),
        ({"task": "score"}, "task"),
        ({"dimensions": 65}, "dimensions"),
        ({"use_activation": False}, "use_activation"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
    ],
)
async def test_what_is_wrong_names_its_field(service: Service, fields: Mapping[str, object], param: str):
    response = await service.post("/pooling", **{"input": "a", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize("field", ["embed_dtype", "normalize", "add_special_tokens", "endianness"])
async def test_nothing_that_would_change_a_vector_is_ignored(service: Service, field: str):
    asked = {"embed_dtype": "float16", "normalize": "l1", "add_special_tokens": 0, "endianness": "big"}[field]
    harmless = {"embed_dtype": "float32", "normalize": True, "add_special_tokens": True, "endianness": "little"}[field]
    for path in PATHS:
        response = await service.post(path, input="a", **{field: asked})
        assert (response.status_code, response.json()["error"]["param"]) == (400, field), response.text
        await found(service, path, input="a", **{field: harmless})


async def test_a_keys_limits_hold(make_service: ServiceFactory, vectors: Path):
    service = await make_service(service_config(vectors), keys=(key(KEY, "team", requests_per_min=1),))
    body = {"model": "demo", "input": "a"}
    answers = [await service.http.post("/pooling", json=body, headers=bearer(KEY)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert (await service.http.post("/pooling", json=body)).status_code == 401


async def tokens(service: Service, text: str) -> list[int]:
    return (await service.post("/tokenize", prompt=text)).json()["tokens"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_text_is_cut_and_keeps_the_token_behind_it(service: Service, path: str):
    """As sentence-transformers cuts it: without its last token, a text's vector would be another text's."""
    *text, end = await tokens(service, RARE)
    assert len(text) > 6
    for side, kept in ((None, text[:5]), ("right", text[:5]), ("left", text[-5:])):
        cut = await found(service, path, input=RARE, truncate_prompt_tokens=6, truncation_side=side)
        assert cut[0] == pytest.approx((await found(service, path, input=[*kept, end]))[0], abs=CLOSE)
    whole = await found(service, path, input=RARE)
    assert await found(service, path, input=RARE, truncate_prompt_tokens=500) == whole
    ids = await found(service, path, input=[5, 6, 7, 8], truncate_prompt_tokens=2)
    assert ids[0] == pytest.approx((await found(service, path, input=[5, 6]))[0], abs=CLOSE)


@pytest.mark.parametrize("text", [LONG, LONG * 20, "a" * 300_000], ids=["words", "many words", "one word"])
async def test_a_text_of_any_length_is_cut_to_what_the_model_takes(service: Service, text: str):
    most = service.router.info.max_seq_len - 1
    response = await service.post("/v1/embeddings", input=[text, "b"], truncate_prompt_tokens=-1)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] == most + len(await tokens(service, "b"))
    *kept, end = await tokens(service, text[: 8 * most])
    again = await found(service, input=[*kept[: most - 1], end])
    assert response.json()["data"][0]["embedding"] == pytest.approx(again[0], abs=CLOSE)


async def test_classifiers_cut_too(make_service: ServiceFactory, labels: Path):
    service = await make_service(service_config(labels))
    for path in ("/v1/classify", "/pooling"):
        short = await found(service, path, input=(await tokens(service, RARE))[:3])
        cut = await found(service, path, input=RARE, truncate_prompt_tokens=3)
        assert cut[0] == pytest.approx(short[0], abs=CLOSE)
    messages = [{"role": "user", "content": "a"}]
    response = await service.post("/v1/classify", messages=messages, truncate_prompt_tokens=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
