"""`/v1/classify`, and scores by a head for labels: what transformers computes, in the forms of vLLM and Jina."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from in_process import Service, ServiceFactory
from test_key_limits import KEY, bearer, key
from tokenizers import Tokenizer, processors
from vector_checkpoints import (
    DOCUMENTS,
    INSTRUCTION,
    QUERIES,
    LabelReference,
    Reference,
    definition,
    embedder,
    make_checkpoint,
    reranker,
    service_config,
)

from deployments.api.classification import ClassifyResponse
from deployments.api.scores import RerankResponse
from deployments.chat.model_text import ModelText
from deployments.chat.pair_prompts import DEFAULT_TEMPLATE
from deployments.router.keys import ApiKey
from llm.errors import ConfigError
from llm.tokenization.hf_tokenizer import HFTokenizer

CLOSE = 1e-4
NAMES = ["calm", "happy", "sad"]
PATHS = ["/v1/classify", "/classify"]
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MESSAGES = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Very well"}]


def with_template(directory: Path, template: str = CHAT + OPENING) -> Path:
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with three labels."""
    return with_template(make_checkpoint(tmp_path_factory.mktemp("several"), labels=NAMES))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model or reranker, with one label."""
    return with_template(make_checkpoint(tmp_path_factory.mktemp("single"), labels=["relevant"]))


@pytest.fixture
async def service(make_service: ServiceFactory, several: Path) -> Service:
    return await make_service(service_config(several))


async def classify(service: Service, path: str = "/v1/classify", **fields: object) -> dict:
    response = await service.post(path, **fields)
    assert response.status_code == 200, response.text
    ClassifyResponse.model_validate_json(response.content, strict=True)
    return response.json()


async def rerank(service: Service, **fields: object) -> dict:
    response = await service.post("/v1/rerank", **{"query": QUERIES[0], "documents": DOCUMENTS, **fields})
    assert response.status_code == 200, response.text
    RerankResponse.model_validate_json(response.content, strict=True)
    return response.json()


def by_index(answer: dict) -> list[float]:
    return [result["relevance_score"] for result in sorted(answer["results"], key=lambda result: result["index"])]


@pytest.mark.parametrize("path", PATHS)
async def test_probabilities_of_labels(service: Service, several: Path, path: str):
    """A softmax over the logits; the label is the likeliest one's, by its name in `id2label`."""
    reference, texts = LabelReference(several), [*QUERIES, *DOCUMENTS]
    expected = [reference.of_text(text).softmax(-1) for text in texts]
    answer = await classify(service, path, input=texts)
    assert [entry["index"] for entry in answer["data"]] == list(range(len(texts)))
    for entry, probs in zip(answer["data"], expected, strict=True):
        assert entry["probs"] == pytest.approx(probs.tolist(), abs=CLOSE)
        assert (entry["label"], entry["num_classes"]) == (NAMES[int(probs.argmax())], 3)
    assert len({entry["label"] for entry in answer["data"]}) > 1, "or the name would say nothing"
    num_tokens = sum(len(reference.tokenizer.encode(text)) for text in texts)
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("list", "demo", "classify-")


async def test_forms_of_input(service: Service, several: Path):
    reference = LabelReference(several)
    ids = reference.tokenizer.encode(QUERIES[0])
    expected = reference.logits(ids).tolist()
    for given in (QUERIES[0], [QUERIES[0]], ids, [ids], [ids, [7]]):
        answer = await classify(service, input=given, use_activation=False)
        assert answer["data"][0]["probs"] == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "<|im_end|>\n"),
        ({"add_generation_prompt": True}, "<|im_end|>\n<|im_start|>assistant\n"),
        ({"continue_final_message": True}, ""),
    ],
)
async def test_chats_are_judged_whole(service: Service, several: Path, options: dict, ending: str):
    """Reward models read a chat to the end of its last turn; nothing invites another."""
    text = f"<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nVery well{ending}"
    expected = LabelReference(several).of_text(text).softmax(-1).tolist()
    answer = await classify(service, messages=MESSAGES, **options)
    assert answer["data"][0]["probs"] == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize(
    ("problem", "function"),
    [
        ("regression", lambda logits: logits),
        ("multi_label_classification", torch.sigmoid),
        ("single_label_classification", lambda logits: logits.softmax(-1)),
    ],
)
async def test_problem_types(make_service: ServiceFactory, tmp_path: Path, problem: str, function):
    directory = make_checkpoint(tmp_path, labels=NAMES, problem_type=problem)
    expected = function(LabelReference(directory).of_text(QUERIES[0]))
    (entry,) = (await classify(await make_service(service_config(directory)), input=QUERIES[0]))["data"]
    assert entry["probs"] == pytest.approx(expected.tolist(), abs=CLOSE)
    assert entry["label"] == NAMES[int(expected.argmax())]


async def test_one_label_is_a_score(make_service: ServiceFactory, single: Path):
    """The sigmoid of its logit, for texts and for pairs, which the tokenizer joins; best documents first."""
    service, reference = await make_service(service_config(single)), LabelReference(single)
    (entry,) = (await classify(service, input=QUERIES[0]))["data"]
    assert entry["probs"] == pytest.approx(reference.of_text(QUERIES[0]).sigmoid().tolist(), abs=CLOSE)
    assert (entry["label"], entry["num_classes"]) == ("relevant", 1)
    logits = torch.cat([reference.of_pair(QUERIES[0], document) for document in DOCUMENTS])
    answer = await rerank(service)
    assert by_index(answer) == pytest.approx(logits.sigmoid().tolist(), abs=CLOSE)
    assert [result["index"] for result in answer["results"]] == logits.argsort(descending=True).tolist()
    assert by_index(await rerank(service, use_activation=False)) == pytest.approx(logits.tolist(), abs=CLOSE)
    scored = (await service.post("/v1/score", text_1=QUERIES[0], text_2=DOCUMENTS)).json()
    assert [each["score"] for each in scored["data"]] == pytest.approx(logits.sigmoid().tolist(), abs=CLOSE)
    num_tokens = sum(len(reference.tokenizer(QUERIES[0], document)["input_ids"]) for document in DOCUMENTS)
    assert scored["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] == num_tokens


@pytest.mark.parametrize(
    ("files", "config", "is_raw"),
    [
        ({"config_sentence_transformers.json": {"model_type": "CrossEncoder",
          "activation_fn": "torch.nn.modules.linear.Identity"}}, {}, True),
        ({}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0"}}, True),
        ({}, {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, True),
        ({}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, False),
        ({"modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.Transformer"}]},
         {}, False),
    ],
    ids=["of 5.4", "of 4", "of 3", "sigmoid", "modules"],
)  # fmt: skip
async def test_activations_that_sentence_transformers_names(
    make_service: ServiceFactory, tmp_path: Path, files: dict, config: dict, is_raw: bool
):
    directory = make_checkpoint(tmp_path, files, labels=["relevant"], **config)
    logits = torch.cat([LabelReference(directory).of_pair(QUERIES[0], document) for document in DOCUMENTS])
    expected = logits if is_raw else logits.sigmoid()
    assert by_index(await rerank(await make_service(service_config(directory)))) == pytest.approx(
        expected.tolist(), abs=CLOSE
    )


@pytest.mark.parametrize("is_own", [False, True])
async def test_a_converted_qwen3_reranker_is_given_its_prompt(
    make_service: ServiceFactory, tmp_path: Path, is_own: bool
):
    """By the configuration, or by its own chat template. The head is the difference of the rows of yes and no, so the
    scores are those of the original."""
    original = make_checkpoint(tmp_path / "original", reranker())
    directory = make_checkpoint(tmp_path / "converted", labels=["LABEL_0"])
    yes_no, converted = Reference(original), LabelReference(directory)
    rows = yes_no.model.lm_head.weight.detach()
    yes, no = (yes_no.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    converted.model.model.load_state_dict(yes_no.model.model.state_dict())
    converted.model.score.weight.data = (rows[yes] - rows[no])[None]
    converted.model.save_pretrained(directory)
    scoring: dict[str, object] = {"template": "qwen3_reranker"}
    if is_own:
        with_template(directory, DEFAULT_TEMPLATE)
        scoring = {"instruction": INSTRUCTION}
    service = await make_service(service_config(directory, scoring=scoring))
    pairs = [(QUERIES[0], document) for document in DOCUMENTS]
    assert by_index(await rerank(service)) == pytest.approx(yes_no.yes_scores(pairs), abs=CLOSE)
    given = "Is it about physics?"
    assert by_index(await rerank(service, instruction=given)) == pytest.approx(
        yes_no.yes_scores(pairs, given), abs=CLOSE
    )


async def test_several_labels_are_no_score(service: Service):
    for path, body in (("/v1/rerank", {"query": "a", "documents": ["b"]}), ("/score", {"text_1": "a", "text_2": "b"})):
        response = await service.post(path, **body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert "3 labels" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES[:1]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": MESSAGES[:1], "max_tokens": 5}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/chat/completions", {"messages": MESSAGES[:1], "stream": True}),
    ],
)
async def test_a_classifier_does_nothing_else(service: Service, path: str, body: dict):
    response = await service.post(path, **body)
    assert response.status_code == 400, response.text
    assert "/v1/classify" in response.json()["error"]["message"]


async def test_models_say_what_they_do(make_service: ServiceFactory, several: Path, tmp_path: Path):
    for directory, task in ((several, "classify"), (make_checkpoint(tmp_path), "generate")):
        service = await make_service(service_config(directory))
        (model,) = (await service.http.get("/v1/models")).json()["data"]
        assert model["task"] == task
    for path in PATHS:
        response = await service.post(path, input="a")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert "no head for labels" in response.json()["error"]["message"]


async def test_emulated_engines_label_texts_too(make_service: ServiceFactory, several: Path):
    service = await make_service(service_config(several, engine_kind="emulated"), num_replicas=2)
    answers = [(await classify(service, input=[f"text {i}" for i in range(100)]))["data"] for _ in range(2)]
    assert answers[0] == answers[1]
    assert {len(entry["probs"]) for entry in answers[0]} == {3}
    assert len({entry["label"] for entry in answers[0]}) == 3


@pytest.mark.parametrize("path", PATHS)
async def test_keys_limits_permissions_and_audit(make_service: ServiceFactory, several: Path, serve_log, path: str):
    """As with every other path at which a model is asked."""
    team = key(KEY, "team", requests_per_min=1, tokens_per_min=60)
    other = ApiKey("other", hashlib.sha256(b"sk-other").digest(), models=frozenset(["none"]))
    service = await make_service(service_config(several, engine_kind="emulated"), keys=(team, other))
    body = {"model": "demo", "input": [[7] * 10, [8] * 5]}
    answers = [
        await service.http.post(path, json=body, headers=headers)
        for headers in (bearer(KEY), bearer(KEY), {}, bearer("sk-other"))
    ]
    assert [answer.status_code for answer in answers] == [200, 429, 401, 404]
    assert int(answers[0].headers["x-ratelimit-remaining-tokens"]) in range(45, 60), "one comes back each second"
    lines = [json.loads(r.getMessage().removeprefix("audit ")) for r in serve_log if r.name == "ray.serve.audit"]
    assert [(line["status"], line["key"], line["route"], line["model"]) for line in lines] == [
        (200, "team", path, "demo"),
        (429, "team", path, ""),
        (401, "unknown", path, ""),
        (404, "other", path, ""),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [7] * 3000}, "input"),
        ({"input": "a", "messages": MESSAGES}, "input"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 3000}]}, "messages"),
        ({"messages": MESSAGES[:1], "continue_final_message": True}, "continue_final_message"),
        ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"input": "a", "use_activation": "no"}, "use_activation"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
async def test_what_is_wrong_names_its_field(service: Service, fields: Mapping[str, object], param: str):
    response = await service.post("/v1/classify", **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


async def test_documents_cannot_write_the_prompt(make_service: ServiceFactory, single: Path):
    service = await make_service(service_config(single))
    plain = (await rerank(service, documents=["x"]))["usage"]["prompt_tokens"]
    assert (await rerank(service, documents=["x<|im_end|>"]))["usage"]["prompt_tokens"] > plain + 3
    refused = await service.post("/v1/rerank", query="a", documents=["b"], instruction="c")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "instruction")
    long = await service.post("/v1/rerank", query="a", documents=["b", "lo ng" * 600])
    assert (long.status_code, long.json()["error"]["param"]) == (400, "documents")


async def test_a_default_prompt_needs_a_template(make_service: ServiceFactory, tmp_path: Path):
    names = {"prompts": {"web": "Find it"}, "default_prompt_name": "web", "model_type": "CrossEncoder"}
    directory = make_checkpoint(tmp_path, {"config_sentence_transformers.json": names}, labels=["relevant"])
    service = await make_service(service_config(directory))
    response = await service.post("/v1/rerank", query="a", documents=["b"])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert "scoring.template" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("files", "config", "settings", "message"),
    [
        (embedder({"pooling_mode_lasttoken": True}), {}, {}, "module Pooling behind a model that classifies"),
        (reranker(), {}, {}, "module LogitScore behind a model that classifies"),
        ({"1_Pooling/config.json": {}}, {}, {}, "module Pooling"),
        ({}, {"problem_type": "clustering"}, {}, "problem_type"),
        ({}, {"problem_type": ["regression"]}, {}, "problem_type"),
        ({}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, {}, "Tanh"),
        ({}, {"sentence_transformers": {"activation_fn": "os.system"}}, {}, "os.system"),
        ({}, {"sentence_transformers": 5}, {}, "must be an object"),
        ({}, {"id2label": {"5": "x"}}, {}, "numbers from 0 on"),
        ({}, {}, {"method": "yes_no"}, "leave out method"),
        ({}, {}, {"method": "embeddings"}, "leave out method"),
        ({}, {}, {"yes_token": "yes", "no_token": "no"}, "leave out method"),
        ({}, {}, {"template": "{% if %}"}, "not valid Jinja"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    tmp_path: Path, files: dict, config: dict, settings: dict, message: str
):
    directory = make_checkpoint(tmp_path, files, labels=["relevant"], **config)
    with pytest.raises(ConfigError, match=message):
        ModelText.load(service_config(directory, scoring=settings))


@pytest.mark.parametrize("is_joined", [False, True])
def test_pairs_are_joined_as_the_post_processor_says(is_joined: bool):
    """With tokens in front, between and behind; without a post-processor nothing but what the settings add."""
    tokenizer = Tokenizer.from_str(definition())
    first, last = control_ids = (tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>"))
    if is_joined:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A <|im_end|> <|im_end|> $B <|im_start|>",
            special_tokens=[("<|im_start|>", first), ("<|im_end|>", last)],
        )  # fmt: skip
    ours = HFTokenizer(tokenizer.to_str())
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    assert ours.encode_pairs(pairs) == [tokenizer.encode(*pair).ids for pair in pairs]
    assert set(control_ids).isdisjoint(ours.encode_pairs([("<|im_end|>", "<|im_start|>")])[0][1:-1]) is not is_joined
