"""Structured output: what a grammar says holds, whatever else runs, and nobody else notices."""

import copy
import json
import random
import re
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from small_engines import check_idle, create_engine, each_depth, run_steps, tokens_of

from llm.config import EngineConfig
from llm.errors import InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.sampling import grammar as grammar_module
from llm.sampling.constraint import TokenMasks
from llm.sampling.grammar import GrammarCompiler
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest, Grammar
from llm.tokenization.hf_tokenizer import HFTokenizer

DEMO = Path(__file__).parents[3] / "configs" / "demo"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {"address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                          "required": ["zip"], "additionalProperties": False}},
}  # fmt: skip
SCHEMAS = {
    "person": PERSON,
    "number": {"type": "integer", "minimum": -5, "maximum": 500},
    "either": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}]},
    "constant": {"const": {"a": [1, 2, {"b": None}]}},
}
GRAMMARS = {
    "schema": Grammar(kind="json_schema", text=json.dumps(PERSON)),
    "regex": Grammar(kind="regex", text="(ab|c)+-[0-9]{3}"),
    "choice": Grammar(kind="choice", text='["yes", "no", "may be?", "ä.*"]'),
    "lark": Grammar(kind="lark", text='start: "<" WORD ("," WORD){0,3} ">"\nWORD: /[a-z]{1,5}/'),
}


@pytest.fixture(scope="module")
def tokenizer() -> HFTokenizer:
    return HFTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model(tokenizer: HFTokenizer) -> DecoderModel:
    """Random weights: it has no idea of JSON, so what is valid is the grammar's doing."""
    torch.manual_seed(0)
    model = DecoderModel(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=512
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def request(grammar: Grammar | None, seed: int = 0, **fields) -> GenerationRequest:
    prompt = (1 + seed % 7, 2, 3, 4, 5)
    defaults = {"max_new_tokens": 300, "temperature": 1.0, "seed": seed}
    return GenerationRequest(prompt_token_ids=prompt, grammar=grammar, **{**defaults, **fields})


def from_schema(schema: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_finished_output_is_valid_by_its_schema(model, tokenizer, name: str, temperature: float):
    engine = create_engine(model, tokenizer=tokenizer)
    requests = [request(from_schema(SCHEMAS[name]), seed, temperature=temperature) for seed in range(6)]
    for result in engine.generate(requests, progress=False):
        assert result.finish_reason is FinishReason.STOP, result
        jsonschema.validate(json.loads(result.text), SCHEMAS[name])
    check_idle(engine)


def test_a_trained_model_answers_within_its_grammar():
    engine = ContinuousBatchingEngine.from_pretrained(DEMO)
    question = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 + 25?"}])
    asked = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 999}}, "required": ["sum"],
             "additionalProperties": False}  # fmt: skip
    kinds = [Grammar(kind="regex", text="[0-9]+"), from_schema(asked), Grammar(kind="json_object"), None]
    results = engine.generate(
        [GenerationRequest(prompt_token_ids=question, grammar=kind, temperature=0, max_new_tokens=60) for kind in kinds]
    )
    assert results[0].text == results[3].text == "42", "the grammar allows what the model would say anyway"
    assert isinstance(json.loads(results[1].text)["sum"], int)
    assert results[2].text.startswith("{")


def test_regex_choice_and_lark(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    requests = [request(GRAMMARS[kind], seed) for kind in ("regex", "choice", "lark") for seed in range(5)]
    texts = [result.text for result in engine.generate(requests, progress=False)]
    assert all(re.fullmatch(r"(ab|c)+-[0-9]{3}", text) for text in texts[:5]), texts[:5]
    assert set(texts[5:10]) <= {"yes", "no", "may be?", "ä.*"}
    assert all(re.fullmatch(r"<[a-z]{1,5}(,[a-z]{1,5}){0,3}>", text) for text in texts[10:]), texts[10:]


@each_depth
@pytest.mark.parametrize("config", [{}, {"max_tokens_per_step": 8}, {"num_pages": 40, "max_seq_len": 150}])
def test_the_same_alone_batched_chunked_preempted(model, tokenizer, max_steps_ahead: int, config: dict):
    """Constrained rows beside free ones, in one step or a step ahead."""
    requests = [
        request(grammar, seed, max_new_tokens=60, temperature=temperature)
        for seed, (grammar, temperature) in enumerate(
            [(g, t) for g in [*GRAMMARS.values(), None] for t in (0.0, 1.0)]
        )
    ]  # fmt: skip
    alone = [create_engine(model, tokenizer=tokenizer).generate([r], progress=False)[0].token_ids for r in requests]
    engine = create_engine(model, tokenizer=tokenizer, max_steps_ahead=max_steps_ahead, **config)
    for each in requests:
        engine.add_request(each)
    outputs = run_steps(engine)
    assert [tokens_of(outputs, each) for each in requests] == alone
    if "num_pages" in config:
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("kind", GRAMMARS)
def test_resumed_elsewhere_it_goes_on_the_same(model, tokenizer, kind: str):
    whole = create_engine(model, tokenizer=tokenizer).generate([request(GRAMMARS[kind], 3)], progress=False)[0]
    for cut in range(1, len(whole.token_ids)):
        resumed = request(GRAMMARS[kind], 3, output_token_ids=whole.token_ids[:cut])
        (result,) = create_engine(model, tokenizer=tokenizer).generate([resumed], progress=False)
        assert result.token_ids == whole.token_ids[cut:]


def test_free_rows_do_not_notice_constrained_ones(model, tokenizer):
    free = [request(None, seed, max_new_tokens=40) for seed in range(4)]
    expected = [r.token_ids for r in create_engine(model, tokenizer=tokenizer).generate(free, progress=False)]
    bound = [request(GRAMMARS["schema"], seed) for seed in range(4)]
    mixed = create_engine(model, tokenizer=tokenizer).generate([*free, *bound], progress=False)
    assert [result.token_ids for result in mixed[:4]] == expected


def test_bias_penalties_and_log_probabilities_go_with_a_grammar(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    fields = {"logprobs": 3, "logit_bias": {65: 50.0}, "frequency_penalty": 1.0}
    (result,) = engine.generate([request(GRAMMARS["regex"], 1, **fields)], progress=False)
    assert re.fullmatch(r"(ab|c)+-[0-9]{3}", result.text), "a bias for what is not allowed has no effect"
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    assert any(entry.top[0][0] != entry.token_id for entry in result.logprobs), "those of the model, before the grammar"


def test_stop_strings_and_length_cut_an_output(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    stopped, cut = engine.generate(
        [request(GRAMMARS["lark"], 2, stop=(">",)), request(GRAMMARS["lark"], 2, max_new_tokens=2)], progress=False
    )
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, ">")
    assert re.fullmatch(r"<[a-z]{1,5}(,[a-z]{1,5}){0,3}", stopped.text)
    assert cut.finish_reason is FinishReason.LENGTH


def test_speculation_leaves_constrained_sequences_alone(model, tokenizer):
    requests = [request(GRAMMARS["regex"], 0), request(None, 1)]
    plain = create_engine(model, tokenizer=tokenizer).generate(requests, progress=False)
    guessing = create_engine(model, tokenizer=tokenizer, num_speculative_tokens=3).generate(requests, progress=False)
    assert [r.token_ids for r in guessing] == [r.token_ids for r in plain]


def deep_schema(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


BAD = {
    "not JSON": Grammar(kind="json_schema", text="{"),
    "no schema": Grammar(kind="json_schema", text="[1]"),
    "unknown type": from_schema({"type": "wizard"}),
    "remote reference": from_schema({"$ref": "http://127.0.0.1:1/schema.json"}),
    "local file": from_schema({"$ref": "file:///etc/passwd"}),
    "dangling reference": from_schema({"$ref": "#/$defs/none"}),
    "150 levels": from_schema(deep_schema(150)),
    "impossible": from_schema({"allOf": [{"type": "string"}, {"type": "number"}]}),
    "regex": Grammar(kind="regex", text="(["),
    "regex with a look-ahead": Grammar(kind="regex", text="(?=a)b"),
    "no choice": Grammar(kind="choice", text="[]"),
    "choices of numbers": Grammar(kind="choice", text="[1, 2]"),
    "lark": Grammar(kind="lark", text="start: nothing"),
    "empty lark": Grammar(kind="lark", text=""),
    "too long": Grammar(kind="regex", text="a" * 300_000),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_is_refused_within_a_second(tokenizer, name: str):
    compiler = GrammarCompiler(tokenizer)
    started = time.process_time()  # which other programs on the machine do not add to
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(BAD[name])
    assert time.process_time() - started < 1
    assert (caught.value.param, caught.value.code) == ("grammar", "invalid_grammar")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_bad_grammar_in_the_engine_ends_its_request_alone(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    good = request(None, 0, max_new_tokens=5)
    bad, fine = engine.generate([request(BAD["regex"]), good], progress=False)
    assert (bad.finish_reason, fine.finish_reason) == (FinishReason.ERROR, FinishReason.LENGTH)
    assert "grammar" in bad.error
    check_idle(engine)


def test_a_grammar_that_is_too_dear_to_follow_ends_its_request_alone(model, tokenizer, monkeypatch):
    limits = grammar_module.LLParserLimits(step_lexer_fuel=10, step_max_items=2)
    monkeypatch.setattr(grammar_module, "_LIMITS", limits)
    engine = create_engine(model, tokenizer=tokenizer)
    dear, free = engine.generate([request(GRAMMARS["schema"]), request(None, 1, max_new_tokens=9)], progress=False)
    assert dear.finish_reason is FinishReason.ERROR
    assert "grammar" in dear.error
    assert len(free.token_ids) == 9
    check_idle(engine)


DEAR = {
    "nested repetition": Grammar(kind="regex", text="((a{1,1000}){1,1000}){1,1000}b"),
    "ambiguous": Grammar(kind="lark", text="start: a\na: a a | /[a-z]/ |"),
    "many branches": from_schema({"anyOf": [{"const": f"{i:05}" * 20} for i in range(2000)]}),
    "powerset": Grammar(kind="regex", text="(a|b)*a(a|b){30}"),
    "deep": from_schema({"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}),
    "large object": from_schema({"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(1500)}}),
}


@pytest.mark.parametrize("name", DEAR)
def test_dear_grammars_stall_no_step(tokenizer, name: str):
    """What a step waits for: the masks. 50 ms is what others may notice, of processor time: the machine may be busy."""
    constraint = GrammarCompiler(tokenizer).start(DEAR[name]).result(timeout=30)
    masks = TokenMasks(tokenizer.vocab_size)
    bits = np.empty((1, masks.num_words), dtype=np.int32)
    rng = random.Random(0)
    slowest = 0.0
    for _ in range(60):
        began = time.process_time()
        masks.write({0: constraint}, bits)
        slowest = max(slowest, time.process_time() - began)
        if constraint.failure is not None or constraint.matcher.is_stopped():
            break
        allowed = np.flatnonzero(np.unpackbits(bits[0].view(np.uint8), bitorder="little"))
        constraint.take(int(rng.choice(allowed)))
    assert slowest < 0.05


@pytest.mark.parametrize("ids", ["300", "97-300", "^300", "4294967296", "-1"])
def test_token_ids_past_the_vocabulary_are_no_grammar(tokenizer, ids):
    compiler = GrammarCompiler(tokenizer, 300)
    assert compiler.compile(Grammar(kind="lark", text="start: <[299]>"))
    with pytest.raises(InvalidRequestError, match="grammar: "):
        compiler.compile(Grammar(kind="lark", text=f"start: <[{ids}]>"))


def test_an_end_id_past_the_vocabulary_leaves_the_others(tokenizer):
    both = HFTokenizer(tokenizer.definition, eos_token_ids=[257, 10**6])
    assert GrammarCompiler(both, 300).compile(GRAMMARS["regex"])
    with pytest.raises(InvalidRequestError, match="end-of-sequence"):
        GrammarCompiler(HFTokenizer(tokenizer.definition, eos_token_ids=[10**6]), 300).compile(GRAMMARS["regex"])


def test_tokens_that_do_not_fit_the_grammar_cannot_be_resumed(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    (result,) = engine.generate([request(GRAMMARS["regex"], output_token_ids=(100,))], progress=False)
    assert result.finish_reason is FinishReason.ERROR
    assert "do not fit" in result.error


def test_giving_up_while_the_grammar_is_compiled(model, tokenizer):
    engine = create_engine(model, tokenizer=tokenizer)
    request_id = engine.add_request(request(GRAMMARS["schema"]))
    assert engine.scheduler.has_pending_work
    assert engine.stats().num_waiting == 1
    assert engine.abort(request_id)
    check_idle(engine)
    assert engine.step() == []


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_new_tokens": 3}])
def test_what_contradicts_a_grammar_is_refused(fields: dict):
    with pytest.raises(ValueError, match="a grammar says where an output ends"):
        request(GRAMMARS["regex"], **fields)


def test_an_engine_without_tokenizer_says_so(model):
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        create_engine(model).add_request(request(GRAMMARS["regex"]))


def test_compiled_grammars_are_kept_up_to_a_bound(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "_MAX_COMPILED", 3)
    compiler = GrammarCompiler(tokenizer)
    for i in range(10):
        compiler.compile(Grammar(kind="regex", text=f"a{{{i + 1}}}"))
    assert len(compiler._compiled) == 3
    first, again = (compiler.compile(Grammar(kind="regex", text="ab")) for _ in range(2))
    first.consume_token(97)
    assert again.validate_tokens([97, 98]) == 2, "each request has its own place in a grammar"


def test_graph_runner_equals_the_reference(model, tokenizer):
    """On a CPU the kernels run in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(backend: str) -> list:
        config = EngineConfig(attention_backend=backend, max_batch_size=4, max_tokens_per_step=32, num_pages=64)
        engine = ContinuousBatchingEngine(copy.deepcopy(model), tokenizer, device, config=config)
        requests = [
            request(grammar, seed, max_new_tokens=5, temperature=seed % 2)
            for seed, grammar in enumerate([*GRAMMARS.values(), None, GRAMMARS["regex"]])
        ]
        requests += [
            request(GRAMMARS["regex"], 20, max_new_tokens=5, logprobs=2),
            request(GRAMMARS["schema"], 21, max_new_tokens=5, logit_bias={100: 5.0}),
        ]
        results = engine.generate(requests, progress=False)
        check_idle(engine)
        return [(result.token_ids, result.finish_reason) for result in results]

    assert run("triton") == run("reference")


def test_an_engine_may_begin_with_a_bound_request(model, tokenizer):
    """No step is before it, whose tokens it could wait for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = EngineConfig(attention_backend="triton", max_batch_size=2, max_tokens_per_step=32, num_pages=16)
    engine = ContinuousBatchingEngine(copy.deepcopy(model), tokenizer, device, config=config)
    (result,) = engine.generate([request(GRAMMARS["regex"], max_new_tokens=4)], progress=False)
    assert result.finish_reason is not FinishReason.ERROR
    assert len(result.token_ids) > 0


def test_any_mixture_of_arrivals_and_departures(model, tokenizer):
    rng = random.Random(0)
    engine = create_engine(model, tokenizer=tokenizer, max_steps_ahead=1, num_pages=60, max_seq_len=200)
    texts: dict[str, str] = {}
    asked: dict[str, Grammar | None] = {}
    finished: set[str] = set()
    for step in range(400):
        if step < 250 and rng.random() < 0.2:
            each = request(rng.choice([*GRAMMARS.values(), None]), rng.randrange(99), max_new_tokens=150)
            asked[engine.add_request(each)] = each.grammar
        if asked and rng.random() < 0.02:
            engine.abort(rng.choice(list(asked)))
        for output in engine.step():
            texts[output.request_id] = texts.get(output.request_id, "") + output.text
            if output.finish_reason is FinishReason.STOP:
                finished.add(output.request_id)
    run_steps(engine)
    patterns = {"regex": r"(ab|c)+-[0-9]{3}", "lark": r"<[a-z]{1,5}(,[a-z]{1,5}){0,3}>"}
    assert len(finished) > 20
    for request_id in finished:
        kind = asked[request_id].kind if asked[request_id] else None
        if kind in patterns:
            assert re.fullmatch(patterns[kind], texts[request_id])
        elif kind == "json_schema":
            jsonschema.validate(json.loads(texts[request_id]), PERSON)
