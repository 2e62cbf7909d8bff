"""What a checkpoint says of its vectors is what clients get: pooling, prompts, dimensions."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from in_process import Service, ServiceFactory, emulated_config
from vector_checkpoints import DOCUMENTS, HIDDEN, Reference, embedder, make_checkpoint, service_config

from deployments.chat.model_text import ModelText
from llm.checkpoint.vector_defaults import load_vector_defaults
from llm.errors import ConfigError
from llm.serving.schemas import Pooling

CLOSE = 1e-4
PROMPTS = {"query": "Instruct: Find it\nQuery:", "document": ""}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen3-Embedding is: the last token's state, behind an end token that the tokenizer adds."""
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    files = embedder(pooling, "Normalize", prompts=PROMPTS, default_prompt_name=None)
    place = tmp_path_factory.mktemp("embedder")
    return make_checkpoint(place, files, ending="<|endoftext|>", is_matryoshka=True)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


@pytest.fixture
async def service(make_service: ServiceFactory, directory: Path) -> Service:
    return await make_service(service_config(directory))


@pytest.fixture
async def client(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(service.api))
    async with openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client


async def embed(service: Service, given: object = "a text", **fields: object) -> list[np.ndarray]:
    response = await service.post("/v1/embeddings", input=given, **fields)
    assert response.status_code == 200, response.text
    return [np.array(entry["embedding"]) for entry in response.json()["data"]]


async def refusal(service: Service, **fields: object) -> tuple[str, str]:
    response = await service.post("/v1/embeddings", **{"input": "a", **fields})
    assert response.status_code == 400, response.text
    return response.json()["error"]["param"], response.json()["error"]["message"]


async def test_vectors_are_those_of_the_files(client: openai.AsyncOpenAI, reference: Reference):
    """By the formula of sentence-transformers, end token and all, through OpenAI's client, which asks for base64."""
    answer = await client.embeddings.create(model="demo", input=DOCUMENTS)
    for entry, text in zip(answer.data, DOCUMENTS, strict=True):
        np.testing.assert_allclose(entry.embedding, reference.vector(text), atol=CLOSE)
    num_tokens = sum(len(reference.tokenizer.encode(text)) for text in DOCUMENTS)
    assert answer.usage.prompt_tokens == num_tokens


async def test_dimensions_are_the_first_and_normalized_again(client: openai.AsyncOpenAI, reference: Reference):
    for size in (1, 8, HIDDEN):
        for encoding in ("float", "base64"):
            answer = await client.embeddings.create(
                model="demo", input=DOCUMENTS[1], dimensions=size, encoding_format=encoding
            )
            vector = answer.data[0].embedding
            if encoding == "base64":
                vector = np.frombuffer(base64.b64decode(vector), np.float32)
            np.testing.assert_allclose(vector, reference.vector(DOCUMENTS[1], size=size), atol=CLOSE)


async def test_pooling_that_a_request_names(service: Service, reference: Reference):
    for pooling in ("mean", "last"):
        (vector,) = await embed(service, DOCUMENTS[0], pooling=pooling)
        np.testing.assert_allclose(vector, reference.vector(DOCUMENTS[0], pooling), atol=CLOSE)


async def test_prompts_go_in_front(service: Service, reference: Reference):
    (vector,) = await embed(service, DOCUMENTS[0], prompt_name="query")
    np.testing.assert_allclose(vector, reference.vector(PROMPTS["query"] + DOCUMENTS[0]), atol=CLOSE)
    (vector,) = await embed(service, DOCUMENTS[0], prompt_name="document")
    np.testing.assert_allclose(vector, reference.vector(DOCUMENTS[0]), atol=CLOSE)
    param, message = await refusal(service, prompt_name="passage")
    assert param == "prompt_name"
    assert "'query', 'document'" in message
    assert (await refusal(service, input=[1, 2], prompt_name="query"))[0] == "prompt_name"


async def test_a_default_prompt_goes_in_front_of_texts_only(make_service: ServiceFactory, tmp_path: Path):
    files = embedder({"pooling_mode": "lasttoken"}, prompts={"web": "Search: "}, default_prompt_name="web")
    checkpoint = make_checkpoint(tmp_path, files)
    service, reference = await make_service(service_config(checkpoint)), Reference(checkpoint)
    (vector,) = await embed(service, "a text")
    np.testing.assert_allclose(vector, reference.vector("Search: a text"), atol=CLOSE)
    (vector,) = await embed(service, reference.tokenizer.encode("a text"))
    np.testing.assert_allclose(vector, reference.vector("a text"), atol=CLOSE)


@pytest.mark.parametrize(
    ("content", "settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, {}, "mean"),
        ({"pooling_mode": ["mean"]}, {}, "mean"),
        ({"pooling_mode": "lasttoken"}, {"pooling": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, {"pooling": "last"}, "last"),
    ],
    ids=["older keys", "newer keys", "the configuration counts first", "in place of what cannot be done"],
)
async def test_pooling_of_the_model_itself(
    make_service: ServiceFactory, tmp_path: Path, content: dict, settings: dict, pooling: str
):
    checkpoint = make_checkpoint(tmp_path, embedder(content))
    service = await make_service(service_config(checkpoint, embeddings=settings))
    (vector,) = await embed(service, DOCUMENTS[0])
    np.testing.assert_allclose(vector, Reference(checkpoint).vector(DOCUMENTS[0], pooling), atol=CLOSE)


async def test_dimensions_are_checked_before_anything_runs(make_service: ServiceFactory):
    service = await make_service(emulated_config(embeddings={"matryoshka_dimensions": [4, 8]}))
    (replica,) = service.client.replicas
    before = replica._loop._engine.stats().num_prompt_tokens
    for size, words in ((17, "have 16; ask for no more"), (5, "cut to 4, 8 only"), (0, "greater"), (-1, "greater")):
        param, message = await refusal(service, dimensions=size)
        assert param == "dimensions"
        assert words in message
    assert replica._loop._engine.stats().num_prompt_tokens == before
    (whole,), (four,) = await embed(service), await embed(service, dimensions=4)
    np.testing.assert_allclose(four, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)
    assert [len(vector) for vector in await embed(service, ["a", "b"], dimensions=16)] == [16, 16]


async def test_a_model_that_was_not_trained_for_it_has_all_its_dimensions(make_service: ServiceFactory):
    service = await make_service()
    param, message = await refusal(service, dimensions=4)
    assert param == "dimensions"
    assert "Matryoshka" in message
    assert len((await embed(service, dimensions=16))[0]) == 16


@pytest.mark.parametrize(
    ("config", "settings", "allowed", "refused"),
    [
        ({"is_matryoshka": True}, {}, [1, 63], []),
        ({"matryoshka_dimensions": [32, 16]}, {}, [16, 32, 64], [8]),
        ({"is_matryoshka": True}, {"is_matryoshka": False}, [64], [32]),
        ({"matryoshka_dimensions": [32]}, {"matryoshka_dimensions": [16]}, [16], [32]),
        ({}, {"is_matryoshka": True}, [5], []),
        ({}, {}, [64], [63]),
    ],
)
def test_where_the_sizes_come_from(tmp_path: Path, config: dict, settings: dict, allowed: list, refused: list):
    checkpoint = make_checkpoint(tmp_path, **config)
    style = ModelText.load(service_config(checkpoint, embeddings=settings)).vectors
    for size in allowed:
        style.check_dimensions(size, HIDDEN)
    for size in refused:
        with pytest.raises(Exception, match="dimensions"):
            style.check_dimensions(size, HIDDEN)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (embedder({"pooling_mode_cls_token": True}), "pooling by cls .the first token of a causal model"),
        (embedder({"pooling_mode": ["mean", "max"]}), "pooling by mean and max"),
        (embedder({"pooling_mode": "weightedmean"}), "pooling by weightedmean"),
        (embedder({"pooling_mode": "mean", "include_prompt": False}), "include_prompt"),
        (embedder({"pooling_mode": "lasttoken"}, "Dense"), "a module Dense"),
        (embedder({"pooling_mode": 3}), "must be the name of a pooling"),
        ({"modules.json": {"idx": 0}}, "not a list of modules"),
        ({"modules.json": [{"type": 3}]}, "not a list of modules"),
        ({"config_sentence_transformers.json": {"prompts": ["a"]}}, "an object of texts"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "web"}}, "name of one of the prompts"),
    ],
)
def test_what_cannot_be_made_is_refused_at_the_start(tmp_path: Path, files: dict, message: str):
    checkpoint = make_checkpoint(tmp_path, files)
    with pytest.raises(ConfigError, match=message):
        ModelText.load(service_config(checkpoint))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"matryoshka_dimensions": 5}, "a list of whole numbers"),
        ({"matryoshka_dimensions": [0]}, "a list of whole numbers"),
        ({"is_matryoshka": "yes"}, "true or false"),
    ],
)
def test_keys_of_the_wrong_type(tmp_path: Path, config: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_vector_defaults(make_checkpoint(tmp_path, **config))


def test_a_pooling_directory_without_a_list_of_modules_counts(tmp_path: Path):
    found = load_vector_defaults(make_checkpoint(tmp_path, {"1_Pooling/config.json": {"pooling_mode": "mean"}}))
    assert (found.pooling, found.is_embedder) == (Pooling.MEAN, True)
    assert load_vector_defaults(tmp_path / "nowhere").pooling is None
