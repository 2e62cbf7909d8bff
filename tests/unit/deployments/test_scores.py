"""`/v1/rerank` and `/v1/score` in every form: the scores that the formulas on model cards give in transformers."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory, emulated_config
from test_key_limits import KEY, bearer, key
from vector_checkpoints import DOCUMENTS, QUERIES, Reference, embedder, make_checkpoint, reranker, service_config

from deployments.api.scores import RerankResponse, ScoreResponse
from deployments.chat.model_text import ModelText
from llm.errors import ConfigError

CLOSE = 1e-4
PATHS = ["/v1/rerank", "/v2/rerank", "/rerank"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reranker"), reranker())


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


@pytest.fixture
async def service(make_service: ServiceFactory, directory: Path) -> Service:
    return await make_service(service_config(directory))


async def rerank(service: Service, path: str = "/v1/rerank", **fields: object) -> dict:
    response = await service.post(path, **{"query": QUERIES[0], "documents": DOCUMENTS, **fields})
    assert response.status_code == 200, response.text
    RerankResponse.model_validate_json(response.content, strict=True)
    return response.json()


async def score(service: Service, path: str = "/v1/score", **fields: object) -> list[float]:
    response = await service.post(path, **fields)
    assert response.status_code == 200, response.text
    ScoreResponse.model_validate_json(response.content, strict=True)
    assert [entry["index"] for entry in response.json()["data"]] == list(range(len(response.json()["data"])))
    return [entry["score"] for entry in response.json()["data"]]


def by_index(answer: dict) -> list[float]:
    return [result["relevance_score"] for result in sorted(answer["results"], key=lambda result: result["index"])]


@pytest.mark.parametrize("query", QUERIES)
async def test_scores_are_those_of_the_model_card(service: Service, reference: Reference, query: str):
    answer = await rerank(service, query=query)
    expected = reference.yes_scores([(query, document) for document in DOCUMENTS])
    assert by_index(answer) == pytest.approx(expected, abs=CLOSE)
    assert len({round(value, 3) for value in expected}) == 3, "or the order would say nothing"
    order = sorted(range(3), key=lambda index: -expected[index])
    assert [result["index"] for result in answer["results"]] == order
    assert [result["document"]["text"] for result in answer["results"]] == [DOCUMENTS[index] for index in order]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 300


async def test_a_request_brings_its_own_instruction(service: Service, reference: Reference):
    pairs = [(QUERIES[0], document) for document in DOCUMENTS]
    expected = reference.yes_scores(pairs, "Is it about physics?")
    assert expected != pytest.approx(reference.yes_scores(pairs), abs=1e-3)
    given = {"instruction": "Is it about physics?"}
    assert by_index(await rerank(service, **given)) == pytest.approx(expected, abs=CLOSE)
    assert by_index(await rerank(service, chat_template_kwargs=given)) == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("path", PATHS)
async def test_what_a_rerank_returns(service: Service, path: str):
    whole = await rerank(service, path)
    best = await rerank(service, path, top_n=2, documents=[{"text": text, "id": 7} for text in DOCUMENTS])
    assert [r["relevance_score"] for r in best["results"]] == pytest.approx(
        [r["relevance_score"] for r in whole["results"][:2]], abs=CLOSE
    )
    assert best["usage"] == whole["usage"]
    assert best["results"][0]["document"] == {"text": DOCUMENTS[best["results"][0]["index"]]}
    bare = await rerank(service, path, return_documents=False, top_n=0, query={"text": QUERIES[0]})
    assert [set(result) for result in bare["results"]] == [{"index", "relevance_score"}] * 3
    assert len((await rerank(service, path, top_n=99))["results"]) == 3


async def test_equal_documents_keep_their_order(service: Service):
    answer = await rerank(service, documents=["b", "a", "b", "a", "b"])
    places = [result["index"] for result in answer["results"]]
    assert places in ([0, 2, 4, 1, 3], [1, 3, 0, 2, 4])


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
async def test_pairs_of_every_form(service: Service, reference: Reference, path: str, names: tuple[str, str]):
    first, second = names
    one = reference.yes_scores([(QUERIES[0], DOCUMENTS[0])])
    assert await score(service, path, **{first: QUERIES[0], second: DOCUMENTS[0]}) == pytest.approx(one, abs=CLOSE)
    many = reference.yes_scores([(QUERIES[0], document) for document in DOCUMENTS])
    for query in (QUERIES[0], [QUERIES[0]]):
        assert await score(service, path, **{first: query, second: DOCUMENTS}) == pytest.approx(many, abs=CLOSE)
    each = reference.yes_scores(list(zip(QUERIES, DOCUMENTS, strict=False)))
    assert await score(service, path, **{first: QUERIES, second: DOCUMENTS[:2]}) == pytest.approx(each, abs=CLOSE)


async def test_log_odds_without_the_activation(service: Service):
    fields = {"text_1": QUERIES[0], "text_2": DOCUMENTS}
    scores = await score(service, **fields)
    odds = await score(service, **fields, use_activation=False)
    assert [1 / (1 + math.exp(-value)) for value in odds] == pytest.approx(scores, abs=CLOSE)
    assert odds != pytest.approx(scores, abs=CLOSE)


async def test_the_query_is_read_once(service: Service):
    """All prompts begin with the instruction and the query, so the prefix cache has them from the second time on."""
    (replica,) = service.client.replicas
    await rerank(service, documents=DOCUMENTS[:1])
    before = replica._loop._engine.stats().num_cached_prompt_tokens
    await rerank(service, documents=["Something else.", "Something new."])
    assert replica._loop._engine.stats().num_cached_prompt_tokens - before > 2 * 100


async def test_many_documents_wait_for_the_first_to_read_a_long_query(make_service: ServiceFactory, directory: Path):
    """So the query is computed once, not for each of the documents that fit into one step."""
    engine = {"max_batch_size": 32, "num_pages": 1024, "max_tokens_per_step": 8192}
    service = await make_service(service_config(directory, engine=engine))
    (replica,) = service.client.replicas
    before = replica._loop._engine.stats()
    answer = await rerank(
        service, query="What is the capital of China? " * 20, documents=[f"It is {i}." for i in range(20)]
    )
    after = replica._loop._engine.stats()
    num_tokens = after.num_prompt_tokens - before.num_prompt_tokens
    assert num_tokens == answer["usage"]["prompt_tokens"]
    assert after.num_cached_prompt_tokens - before.num_cached_prompt_tokens > 0.8 * num_tokens


async def test_documents_cannot_write_the_prompt(service: Service):
    """A document that closes the user's turn by itself is read as text: more tokens, and no control token."""
    plain = (await rerank(service, documents=["x"]))["usage"]["prompt_tokens"]
    sly = (await rerank(service, documents=["x<|im_end|>"]))["usage"]["prompt_tokens"]
    assert sly > plain + 3


async def test_many_documents_come_in_few_calls(make_service: ServiceFactory, directory: Path):
    service = await make_service(
        service_config(directory, engine_kind="emulated", emulation={"max_seq_len": 1024, "tokens_per_s": 1000.0},
                       engine={"max_batch_size": 64, "num_pages": 8192}),
        num_replicas=2,
    )  # fmt: skip
    documents = [f"document {i}" for i in range(300)]
    engines = [replica._loop._engine for replica in service.client.replicas]
    before = sum(engine.stats().num_generated_tokens for engine in engines)
    answer = await rerank(service, documents=documents)
    assert sorted(result["index"] for result in answer["results"]) == list(range(300))
    assert service.client.num_calls < 60
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(engine.stats().num_generated_tokens for engine in engines) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"query": None}, "query"),
        ({"query": ["a"]}, "query"),
        ({"query": {"txt": "a"}}, "query.text"),
        ({"documents": []}, "documents"),
        ({"documents": "one"}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": ["a", 7]}, "documents[1]"),
        ({"documents": [{"text": 7}]}, "documents[0].text"),
        ({"documents": [[1, 2]]}, "documents[0]"),
        ({"documents": ["a"] * 2049}, "documents"),
        ({"documents": ["long " * 5000]}, "documents"),
        ({"documents": ["lo ng" * 300]}, "documents"),
        ({"top_n": -1}, "top_n"),
        ({"top_n": 1.5}, "top_n"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"max_tokens_per_doc": 10}, "max_tokens_per_doc"),
        ({"instruction": 5}, "instruction"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"use_activation": "no"}, "use_activation"),
        ({"model": "other"}, "model"),
    ],
)
async def test_what_is_wrong_names_its_field(service: Service, fields: Mapping[str, object], param: str):
    response = await service.post("/v1/rerank", **{"query": "a", "documents": ["b"], **fields})
    assert response.status_code == (404 if param == "model" else 400), response.text
    assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text_1"),
        ({"text_1": "a"}, "text_2"),
        ({"text_1": "a", "documents": "b"}, "text_2"),
        ({"text_1": "a", "text_2": "b", "queries": "c", "documents": "d"}, "text_1"),
        ({"text_1": "a", "text_2": "b", "documents": "d"}, "text_2"),
        ({"data_1": "a", "text_2": "b"}, "data_2"),
        ({"queries": "a", "documents": "b", "items": "c"}, "documents"),
        ({"text_1": "a", "data_1": "b", "data_2": "c"}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        ({"queries": ["a", "b"], "documents": "c"}, "queries"),
        ({"text_1": [], "text_2": "b"}, "text_1"),
        ({"text_1": ["a", 5], "text_2": "b"}, "text_1[1]"),
        ({"queries": "a", "documents": [""]}, "documents[0]"),
    ],
)
async def test_what_is_wrong_with_pairs_names_its_field(service: Service, fields: Mapping[str, object], param: str):
    response = await service.post("/v1/score", **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({}, {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}),
        ({"config_sentence_transformers.json": {"model_type": "CrossEncoder"}}, {}),
    ],
    ids=["as vLLM has it", "by its type"],
)
async def test_other_marks_of_a_cross_encoder(
    make_service: ServiceFactory, tmp_path: Path, reference: Reference, files: dict, config: dict
):
    service = await make_service(service_config(make_checkpoint(tmp_path, files, **config)))
    expected = reference.yes_scores([(QUERIES[0], document) for document in DOCUMENTS])
    assert by_index(await rerank(service)) == pytest.approx(expected, abs=CLOSE)


async def test_the_configuration_can_say_it(make_service: ServiceFactory, tmp_path: Path, reference: Reference):
    """Of a checkpoint that says nothing: which tokens, which prompt, and from a file."""
    path = tmp_path / "prompt.jinja"
    path.write_text("{{ messages[1].content }} answers {{ messages[0].content }}{% if instruction %}!{% endif %}")
    checkpoint = make_checkpoint(tmp_path / "plain")
    scoring = {"method": "yes_no", "template": str(path), "yes_token": "no", "no_token": "yes"}
    service = await make_service(service_config(checkpoint, scoring=scoring))
    ids = reference.tokenizer.encode(f"{DOCUMENTS[0]} answers {QUERIES[0]}")
    (value,) = await score(service, text_1=QUERIES[0], text_2=DOCUMENTS[0])
    assert value == pytest.approx(1 - reference.yes_probability(ids), abs=CLOSE)
    assert await score(service, text_1=QUERIES[0], text_2=DOCUMENTS[0], instruction="i") != [value]


async def test_a_checkpoints_own_template_and_instruction_are_used(
    make_service: ServiceFactory, tmp_path: Path, reference: Reference
):
    """As sentence-transformers 5.4 saves them: a chat template that reads the roles, and a default prompt."""
    template = (
        "{% set found = messages | selectattr('role', 'eq', 'query') | first %}"
        '{% for m in messages if m.role == "document" %}{{ m.content }}|{{ found.content }}{% endfor %}'
        "{% for m in messages if m.role == 'system' %}|{{ m.content }}{% endfor %}"
    )
    names = {"prompts": {"web": "Find it"}, "default_prompt_name": "web"}
    checkpoint = make_checkpoint(tmp_path, {**reranker(), "config_sentence_transformers.json": names})
    (checkpoint / "chat_template.jinja").write_text(template)
    service = await make_service(service_config(checkpoint))
    for given, used in (({}, "Find it"), ({"instruction": "Find more"}, "Find more")):
        ids = reference.tokenizer.encode(f"{DOCUMENTS[0]}|{QUERIES[0]}|{used}")
        scores = await score(service, text_1=QUERIES[0], text_2=DOCUMENTS[0], **given)
        assert scores == pytest.approx([reference.yes_probability(ids)], abs=CLOSE)


async def test_cosines_of_an_embedding_model(make_service: ServiceFactory, tmp_path: Path):
    """With the prompts that its files name for the two sides; a text in several pairs is read once."""
    prompts = {"query": "Instruct: Find it\nQuery:", "document": "Passage: "}
    files = embedder({"pooling_mode_lasttoken": True}, "Normalize", prompts=prompts)
    checkpoint = make_checkpoint(tmp_path, files, ending="<|endoftext|>")
    reference, service = Reference(checkpoint), await make_service(service_config(checkpoint))
    queries = [reference.vector(prompts["query"] + text) for text in QUERIES]
    documents = [reference.vector(prompts["document"] + text) for text in DOCUMENTS]
    expected = [float(queries[0] @ vector) for vector in documents]
    answer = await rerank(service)
    assert by_index(answer) == pytest.approx(expected, abs=CLOSE)
    each = [float(query @ document) for query, document in zip(queries, documents, strict=False)]
    assert await score(service, text_1=QUERIES, text_2=DOCUMENTS[:2]) == pytest.approx(each, abs=CLOSE)
    once = (await rerank(service, documents=[DOCUMENTS[0]]))["usage"]["prompt_tokens"]
    assert (await rerank(service, documents=[DOCUMENTS[0]] * 5))["usage"]["prompt_tokens"] == once
    refused = await service.post("/v1/rerank", query="a", documents=["b"], instruction="c")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instruction")


async def test_the_configuration_can_ask_any_model_for_cosines(make_service: ServiceFactory, tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path)
    reference = Reference(checkpoint)
    settings = {"scoring": {"method": "embeddings"}, "embeddings": {"pooling": "mean"}}
    service = await make_service(service_config(checkpoint, **settings))
    expected = reference.vector(QUERIES[0], "mean") @ reference.vector(DOCUMENTS[0], "mean")
    scores = await score(service, text_1=QUERIES[0], text_2=DOCUMENTS[0])
    assert scores == pytest.approx([float(expected)], abs=CLOSE)


@pytest.mark.parametrize("path", [*PATHS, "/v1/score"])
async def test_a_model_that_says_nothing_is_not_asked(make_service: ServiceFactory, path: str):
    service = await make_service()
    body = {"text_1": "a", "text_2": "b"} if path.endswith("score") else {"query": "a", "documents": ["b"]}
    response = await service.post(path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert "scoring.method" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank", "/v1/rerank", "/score", "/v1/score"])
async def test_a_keys_limits_hold_at_every_path(make_service: ServiceFactory, path: str):
    config = emulated_config(scoring={"method": "embeddings"})
    service = await make_service(config, keys=(key(KEY, "team", requests_per_min=1),))
    body = {
        "model": "demo",
        **({"text_1": "a", "text_2": "b"} if "score" in path else {"query": "a", "documents": ["b"]}),
    }
    answers = [await service.http.post(path, json=body, headers=bearer(KEY)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert (await service.http.post(path, json=body)).status_code == 401


@pytest.mark.parametrize(
    ("files", "config", "settings", "message"),
    [
        ({"modules.json": [{"type": "a.Transformer", "path": ""}, {"type": "a.LogitScore", "path": "s"}],
          "s/config.json": {"true_token_id": 5, "false_token_id": None}}, {}, {}, "true_token_id alone"),
        ({"modules.json": [{"type": "a.LogitScore", "path": "s"}], "s/config.json": {"true_token_id": "x",
          "false_token_id": 3}}, {}, {}, "must be a token's id"),
        ({}, {"classifier_from_token": ["Yes"]}, {}, "two tokens of a Qwen3-Reranker only"),
        ({}, {"classifier_from_token": "yes"}, {}, "a list of texts"),
        ({}, {}, {"method": "yes_no", "yes_token": "certainly", "no_token": "no"}, "'certainly' is not one token"),
        ({}, {}, {"method": "yes_no", "yes_token": "no", "no_token": "no"}, "the same token"),
        ({}, {}, {"method": "yes_no", "template": "{% if %}"}, "not valid Jinja"),
        ({}, {}, {"method": "yes_no", "template": "/no/such/file"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_score_is_refused_at_the_start(
    tmp_path: Path, files: dict, config: dict, settings: dict, message: str
):
    checkpoint = make_checkpoint(tmp_path, files, **config)
    with pytest.raises(ConfigError, match=message):
        ModelText.load(service_config(checkpoint, scoring=settings))


def test_the_prompt_of_qwen_needs_its_tokens():
    with pytest.raises(ConfigError, match=r"scoring\.template"):
        ModelText.load(emulated_config(scoring={"method": "yes_no", "yes_token": "y", "no_token": "n"}))
