"""Embeddings: the numbers, and the API around them."""

import asyncio
import base64
import struct
from pathlib import Path

import pytest
import torch
from in_process import Service, ServiceFactory, emulated_config
from scripted_engine import TOOL_TEMPLATE, model_config

from deployments.api.openai.responses import EmbeddingList
from llm.config import EngineConfig
from llm.core.kv_cache import KVCache
from llm.errors import InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.serving.embedding import Embedding, Pooling
from llm.serving.engine import ContinuousBatchingEngine


def create_model(**shape) -> DecoderModel:
    torch.manual_seed(0)
    return DecoderModel(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64, **shape
    ).eval()  # fmt: skip


def vector_of(model: DecoderModel, ids: list[int], pooling: Pooling, chunk_len: int) -> list[float]:
    work = Embedding(model, ids, pooling, chunk_len=chunk_len)
    for _ in range(len(ids)):
        vector = work.advance()
        if vector is not None:
            return vector
    raise AssertionError("it never ended")


@pytest.mark.parametrize("shape", [{}, {"window_size": 5}], ids=["full", "window"])
def test_vectors_are_pooled_hidden_states_whatever_the_chunks(shape: dict):
    model = create_model(**shape)
    ids = list(range(20))
    hidden = []
    model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    caches: list[KVCache] = model.make_kv_caches(1)
    with torch.inference_mode():
        model(ids, caches, use_cache=True)
    states = hidden.pop()[0]
    for pooling, expected in ((Pooling.LAST, states[-1]), (Pooling.MEAN, states.mean(0))):
        for chunk_len in (64, 7, 1):
            vector = vector_of(model, ids, pooling, chunk_len)
            torch.testing.assert_close(torch.tensor(vector), expected / expected.norm(), atol=1e-5, rtol=1e-4)


def test_the_engine_refuses_what_it_cannot_embed():
    engine = ContinuousBatchingEngine(create_model(), config=EngineConfig(max_batch_size=2))
    for ids in ([], [50], [1] * 64):
        with pytest.raises(InvalidRequestError):
            engine.embed(ids)


@pytest.fixture
async def service(make_service: ServiceFactory, tmp_path: Path) -> Service:
    return await make_service(model_config(tmp_path, TOOL_TEMPLATE, engine_kind="torch"), num_replicas=2)


async def embed(service: Service, given: object, **fields) -> dict:
    response = await service.post("/v1/embeddings", input=given, **fields)
    assert response.status_code == 200, response.text
    EmbeddingList.model_validate_json(response.content, strict=True)
    return response.json()


async def test_forms_of_input_and_output(service: Service):
    answer = await embed(service, "seventeen")
    (entry,) = answer["data"]
    vector = entry["embedding"]
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert answer["usage"] == {"prompt_tokens": 10, "total_tokens": 10}, "nine letters and the beginning"
    encoded = (await embed(service, "seventeen", encoding_format="base64"))["data"][0]["embedding"]
    assert list(struct.unpack(f"<{len(vector)}f", base64.b64decode(encoded))) == pytest.approx(vector, abs=1e-7)
    ids = (await service.post("/tokenize", prompt="seventeen")).json()["tokens"]
    several = await embed(service, ["seventeen", "12 + 30"])
    assert [entry["index"] for entry in several["data"]] == [0, 1]
    for same in (several, await embed(service, ids), await embed(service, [ids, [97]])):
        assert same["data"][0]["embedding"] == pytest.approx(vector, abs=1e-5)
    mean = (await embed(service, "seventeen", pooling="mean"))["data"][0]["embedding"]
    assert mean != pytest.approx(vector, abs=1e-2)
    await embed(service, "a", dimensions=len(vector))


async def test_embeddings_beside_generation(service: Service):
    alone = await embed(service, "seventeen")
    stream = asyncio.ensure_future(service.post("/v1/completions", prompt="a", max_tokens=60, ignore_eos=True))
    together = await asyncio.gather(*(embed(service, "seventeen") for _ in range(20)))
    assert (await stream).json()["usage"]["completion_tokens"] == 60
    assert all(
        answer["data"][0]["embedding"] == pytest.approx(alone["data"][0]["embedding"], abs=1e-5) for answer in together
    )


async def test_a_lost_replica_is_replaced_by_another(service: Service):
    service.client.kill(0)
    await embed(service, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [1, -1]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [97] * 3000}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": 5}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 3}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
    ],
)
async def test_what_is_wrong_is_400(service: Service, changes: dict, param: str):
    response = await service.post("/v1/embeddings", **{"input": "a", **changes})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_an_emulated_engine_says_that_it_cannot(make_service: ServiceFactory):
    service = await make_service(emulated_config())
    response = await service.post("/v1/embeddings", input="a")
    assert (response.status_code, "no embeddings" in response.json()["error"]["message"]) == (400, True)
