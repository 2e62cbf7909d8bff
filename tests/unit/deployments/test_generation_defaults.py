"""What a checkpoint recommends counts where a request says nothing, and what cannot be done is said at start."""

import json
import logging
from pathlib import Path

import pytest
from in_process import DEMO, Service, ServiceFactory, emulated_config
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from deployments.channel.messages import EngineInfo
from deployments.chat.encoder import PromptEncoder
from deployments.chat.model_format import ModelFormat
from deployments.chat.requests import ChatRequest, CompletionRequest
from deployments.cli import app
from deployments.cli.serve import _find_models
from deployments.config import AppConfig, LimitsConfig
from deployments.serve.config_file import read_config_file
from llm.checkpoint.generation_defaults import GenerationDefaults
from llm.sampling.grammar import GrammarCompiler
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer

END = 257
CONTEXT = 512
FIELDS = {
    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "min_new_tokens": 2,
    "max_new_tokens": 100,
}  # fmt: skip
DEFAULTS = GenerationDefaults(**FIELDS, suppress_tokens=(97, 98))


def checkpoint(directory: Path, behind: str | None = None, **generation: object) -> Path:
    """The demo checkpoint with another generation_config.json, and with `behind` put behind every text."""
    directory.mkdir()
    for path in DEMO.iterdir():
        if path.name not in ("generation_config.json", "tokenizer.json"):
            (directory / path.name).symlink_to(path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END, **generation}))
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    if behind is not None:
        special = [(behind, tokenizer.token_to_id(behind))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {behind}", special_tokens=special)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    tokenizer = HFTokenizer.from_pretrained(DEMO)
    info = EngineInfo(
        model="demo", max_seq_len=CONTEXT, num_slots=4096, page_size=16, max_step_tokens=256, vocab_size=264,
        device="none", dtype="none", backend="none",
    )  # fmt: skip
    grammars = GrammarCompiler(tokenizer, info.vocab_size)
    return PromptEncoder(tokenizer, DEFAULTS, info, LimitsConfig(), ModelFormat(), grammars)


def chat(encoder: PromptEncoder, **fields: object) -> GenerationRequest:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
    return encoder.chat(ChatRequest.model_validate(body)).requests[0]


def completion(encoder: PromptEncoder, **fields: object) -> GenerationRequest:
    return encoder.completion(CompletionRequest.model_validate({"model": "demo", "prompt": "hi", **fields})).requests[0]


@pytest.mark.parametrize("name", FIELDS)
def test_a_request_that_says_nothing_gets_the_checkpoints_value(encoder, name):
    assert getattr(chat(encoder), name) == FIELDS[name]
    if name != "max_new_tokens":  # OpenAI's completions have 16 tokens unless told otherwise
        assert getattr(completion(encoder), name) == FIELDS[name]


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0.0}, "temperature", 0.0),
        ({"top_p": 1.0}, "top_p", 1.0),
        ({"top_k": -1}, "top_k", None),
        ({"min_p": 0.0}, "min_p", 0.0),
        ({"repetition_penalty": 1.0}, "repetition_penalty", 1.0),
        ({"min_tokens": 0}, "min_new_tokens", 0),
        ({"max_tokens": 300}, "max_new_tokens", 300),
    ],
)
def test_a_request_that_says_something_gets_that(encoder, fields, name, value):
    assert getattr(chat(encoder, **fields), name) == value
    assert getattr(completion(encoder, **fields), name) == value


def test_suppressed_tokens_are_banned_unless_the_request_biases_them_itself(encoder):
    assert chat(encoder).logit_bias.keys() == {97, 98}
    assert max(chat(encoder).logit_bias.values()) < -1e6
    mine = chat(encoder, logit_bias={"97": 5, "99": -1}).logit_bias
    assert (mine[97], mine[99]) == (5, -1)
    assert mine[98] < -1e6


def test_a_recommended_length_past_the_context_is_cut_to_it(encoder):
    """It is no mistake of the request's."""
    long = PromptEncoder(
        encoder.tokenizer, GenerationDefaults(max_new_tokens=10**6), encoder.info, encoder.limits, encoder.format,
        encoder.grammars,
    )  # fmt: skip
    request = chat(long)
    assert request.max_new_tokens == CONTEXT - len(request.prompt_token_ids)


def test_a_grammar_says_itself_where_an_answer_ends(encoder):
    assert chat(encoder, response_format={"type": "json_object"}).min_new_tokens == 0


async def test_defaults_over_http(make_service: ServiceFactory, tmp_path: Path):
    """Greedy answers of the demo model, "42": a token of it banned, a stop string, a length."""

    async def ask(service: Service, **fields: object) -> tuple[str, str, int]:
        messages = [{"role": "user", "content": "What is 17 + 25?"}]
        response = await service.post("/v1/chat/completions", messages=messages, temperature=0, **fields)
        (choice,) = response.json()["choices"]
        return choice["message"]["content"], choice["finish_reason"], response.json()["usage"]["completion_tokens"]

    async def serve(name: str, **generation: object) -> Service:
        model = str(checkpoint(tmp_path / name, **generation))
        fields = {"model": model, "served_model_name": "demo", "engine": {"max_batch_size": 4}}
        return await make_service(AppConfig.model_validate(fields))

    service = await serve("suppress", suppress_tokens=[ord("4")], max_new_tokens=3)
    text, *rest = await ask(service, ignore_eos=True)
    assert "4" not in text
    assert rest == ["length", 3]
    assert await ask(service, logit_bias={str(ord("4")): 0}) == ("42", "stop", 3)
    assert (await ask(service, ignore_eos=True, max_tokens=5))[1:] == ("length", 5)
    service = await serve("stop", stop_strings=["2"])
    assert await ask(service) == ("4", "stop", 2)
    assert await ask(service, stop=["never"]) == ("42", "stop", 3)


async def test_what_is_not_applied_is_logged_and_shown(make_service: ServiceFactory, tmp_path: Path, caplog, capsys):
    model = checkpoint(tmp_path / "model", no_repeat_ngram_size=3, eos_token_id=[END, 10**6])
    with caplog.at_level(logging.WARNING):
        await make_service(emulated_config(model=str(model), served_model_name="demo"))
    expected = [
        f"{model}/generation_config.json: no_repeat_ngram_size=3 is not applied: the engine cannot do it",
        f"{model}/generation_config.json: eos_token_id [1000000] is left out: the model has 264 ids",
    ]
    assert [record.message for record in caplog.records if "generation_config" in record.message] == expected
    config = tmp_path / "config.yaml"
    application = {"name": "x", "import_path": "deployments.app:build_app", "args": {"model": str(model)}}
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    result = CliRunner().invoke(app, ["check", str(config)])
    assert result.exit_code == 0, result.output
    _find_models({"applications": [application]}, read_config_file(config).apps)
    shown = capsys.readouterr().err
    for line in expected:
        assert f"! {line}\n" in result.output
        assert f"rayline: warning: {line}\n" in shown


async def test_embeddings_and_completions_get_what_stands_behind_a_text(make_service: ServiceFactory, tmp_path: Path):
    """The `tokenizers` library says what; the last token, which is pooled, is the one behind the text."""
    model = checkpoint(tmp_path / "model", behind="<|end|>")
    fields = {"model": str(model), "served_model_name": "demo", "engine": {"max_batch_size": 4}}
    service = await make_service(AppConfig.model_validate(fields))
    library = Tokenizer.from_file(str(model / "tokenizer.json"))
    texts = ["seventeen", "a"]
    ids = [library.encode(text).ids for text in texts]
    assert [one[-1] for one in ids] == [END, END]
    assert [(await service.post("/tokenize", prompt=text)).json()["tokens"] for text in texts] == ids
    of_texts, of_ids, cut = [
        [entry["embedding"] for entry in (await service.post("/v1/embeddings", input=given)).json()["data"]]
        for given in (texts, ids, [one[:-1] for one in ids])
    ]
    for index in range(len(texts)):
        assert of_texts[index] == pytest.approx(of_ids[index], abs=1e-5)
        assert of_texts[index] != pytest.approx(cut[index], abs=1e-2)
    answers = [
        (await service.post("/v1/completions", prompt=given, max_tokens=4, temperature=0, ignore_eos=True)).json()
        for given in (texts[0], ids[0])
    ]
    assert answers[0]["usage"]["prompt_tokens"] == len(ids[0])
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]


BAD_IDS = [264, 2**31, 2**32, 2**63, 10**30, -1, True, 1.0, "1", None]


@pytest.mark.parametrize("token_id", BAD_IDS)
async def test_ids_that_are_none_of_the_models_are_refused_everywhere(make_service: ServiceFactory, token_id: object):
    service = await make_service()
    written = "264" if token_id == "1" else json.dumps(token_id)
    for path, fields, param in (
        ("/v1/completions", {"prompt": [97, token_id]}, "prompt"),
        ("/v1/completions", {"prompt": [[97], [token_id]]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [97, token_id]}, "stop_token_ids"),
        ("/v1/embeddings", {"input": [97, token_id]}, "input"),
        ("/detokenize", {"tokens": [97, token_id]}, "tokens"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {written: 1}}, "logit_bias"),
        (
            "/v1/completions",
            {"prompt": "a", "guided_grammar": f"start: <[{written}]>"},
            "guided_grammar",
        ),
    ):
        response = await service.post(path, **fields)
        assert response.status_code == 400, (path, fields, response.text)
        assert param in (response.json()["error"]["param"] or ""), (path, fields, response.text)
