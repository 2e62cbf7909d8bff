"""Structured output: grammars compiled for a tokenizer, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is compiled in a thread while its request waits. From then on it allows or forbids tokens draw by draw (see
`llm.sampling.constraint`); the allowed tokens are computed during the model's forward pass.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from llm.sampling.constraint import Constraint
from llm.sampling.json_schema import invalid_grammar, parse_json, prepare
from llm.sampling.large_integers import write_out
from llm.sampling.tagged_calls import Pieces, RuleWriter, TaggedCalls
from llm.schemas import Grammar, GrammarKind, Preamble
from llm.tokenization.hf_tokenizer import HFTokenizer

MAX_GRAMMAR_CHARS = 256 << 10
_MAX_COMPILED = 128
_COMPILE_THREADS = 2
_JSON_OPTIONS = {
    # One space, or a new line and its indentation: without a bound a model may write white space forever.
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n {0,40})?",
}
_FREE = "(?s:.*)"
_LIMITS = LLParserLimits(
    # Limits on what one row may cost a step: about 4 ms of lexing and 1 ms of parsing, by the speeds in llguidance's
    # documentation. A request whose grammar needs more ends with an error.
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_grammar_size=100_000,
    max_lexer_states=50_000,
)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and caches the most recent ones. Thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: columns of the model's logits; None for the tokenizer's own number of ids.
    """

    def __init__(self, tokenizer: HFTokenizer, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._lock = Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._threads = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="grammar")

    def start(self, grammar: Grammar, output_ids: SequenceOf[int] = ()) -> "Future[Constraint]":
        """Compile a grammar in a thread, unless it is cached, then consume what an earlier engine generated.

        The future raises `InvalidRequestError`, as `compile` does.
        """
        return self._threads.submit(self._constraint, grammar, output_ids)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Return the grammar's matcher at its beginning, for the caller's use only.

        Raises:
            InvalidRequestError: the grammar is invalid or too large.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = LLMatcher(self._ll_tokenizer, to_llguidance(grammar, self._pieces), limits=_LIMITS)
            if compiled.is_error():
                raise invalid_grammar(_first_line(compiled.get_error()))
            if not compiled.deep_copy().compute_bitmask().strip(b"\0"):
                raise invalid_grammar("no answer fits it")
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)

    def _constraint(self, grammar: Grammar, output_ids: SequenceOf[int]) -> Constraint:
        constraint = Constraint(self.compile(grammar))
        constraint.advance(output_ids, num_prompt_tokens=0)
        if constraint.failure is not None:
            raise invalid_grammar("the tokens generated so far do not fit the grammar")
        return constraint

    def _pieces(self, text: str) -> list[str]:
        """Lark for a text that may contain control tokens.

        llguidance does not treat special tokens, or added ones in angle brackets, as text, so their ids stand for them.
        """
        pieces = []
        for piece, token_id in self._tokenizer.split_control(text):
            if piece:
                pieces.append(json.dumps(piece))
            if token_id is None:
                continue
            if token_id < self._vocab_size and self._ll_tokenizer.is_special_token(token_id):
                pieces.append(f"<[{token_id}]>")
            else:
                pieces.append(json.dumps(self._tokenizer.token_text(token_id)))
        return pieces

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        eos_ids = sorted(i for i in self._tokenizer.eos_token_ids if i < self._vocab_size)
        if not eos_ids:
            raise invalid_grammar("it needs a model with an end-of-sequence token; this one has none")
        return LLTokenizer(
            self._tokenizer.cut_definition(self._vocab_size), n_vocab=self._vocab_size, eos_token=eos_ids
        )


def to_llguidance(grammar: Grammar, pieces: Pieces) -> str:
    """Write the grammar in llguidance's own form.

    Args:
        pieces: Lark for a text that may contain control tokens.

    Raises:
        InvalidRequestError: it is too large or too deep, or not JSON although it should be.
    """
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise invalid_grammar(f"it is longer than {MAX_GRAMMAR_CHARS} characters")
    grammars = _grammars(grammar, pieces)
    if grammar.preamble is not None:
        grammars.insert(0, {"name": "whole", "lark_grammar": _preamble_lark(grammar.preamble, pieces)})
        grammars[1]["name"] = "bound"
    return json.dumps({"grammars": grammars})


def _grammars(grammar: Grammar, pieces: Pieces) -> list[dict[str, Any]]:
    """The grammars that constrain the output, the starting one first."""
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return _from_schema({"type": "object"}, grammar)
        case GrammarKind.JSON_SCHEMA:
            return _from_schema(parse_json(grammar.text), grammar)
        case GrammarKind.CHOICE:
            choices = parse_json(grammar.text)
            if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
                raise invalid_grammar("choices must be a list of strings that are not empty")
            return [_from_regex("|".join(map(_literal, choices)))]
        case GrammarKind.REGEX:
            _check_text(grammar.text)
            # As in JSON schemas, whose dialect is ECMA-262: digits and word characters are ASCII only.
            return [_from_regex(regex_to_lark(grammar.text, "dw"))]
        case GrammarKind.LARK:
            _check_text(grammar.text)
            return [{"lark_grammar": grammar.text}]
        case GrammarKind.CALLS:
            return _from_calls(TaggedCalls.model_validate(parse_json(grammar.text)), pieces)


def _from_regex(regex: str) -> dict[str, Any]:
    (grammar,) = json.loads(LLMatcher.grammar_from_regex(regex))["grammars"]
    return {key: value for key, value in grammar.items() if value is not None}


def _from_schema(schema: object, grammar: Grammar, prefix: str = "") -> list[dict[str, Any]]:
    options = {**_JSON_OPTIONS, "lenient": grammar.is_lenient}
    prepared = prepare(schema, is_lenient=grammar.is_lenient)
    return write_out(prepared, options, prefix) or [{"json_schema": {**prepared, "x-guidance": options}}]


def _from_calls(form: TaggedCalls, pieces: Pieces) -> list[dict[str, Any]]:
    grammars: list[dict[str, Any]] = []

    def refer(schema: dict[str, Any], is_strict: bool) -> str:
        name = f"args{len(grammars)}"
        kind = Grammar(kind=GrammarKind.JSON_SCHEMA, is_lenient=not is_strict)
        first, *others = _from_schema(schema, kind, prefix=f"{name}_")
        grammars.extend([{**first, "name": name}, *others])
        return f"@{name}"

    lark = RuleWriter(form, pieces, _literal, refer).lark()
    return [{"lark_grammar": lark}, *grammars]


def _preamble_lark(preamble: Preamble, pieces: Pieces) -> str:
    """Free text followed by the grammar `bound`."""
    opening, closing, lead = (pieces(text) for text in (preamble.opening, preamble.closing, preamble.lead))
    if closing[0].startswith("<"):
        free, rules = " ".join(["TEXT", *closing]), [f"TEXT: /{_FREE}/"]
    else:
        # The text ends at the first occurrence of the tag, regardless of token boundaries.
        tag = _literal(json.loads(closing[0]))
        free, rules = " ".join(["text", *closing[1:]]), [f"text[lazy]: /{_FREE}{tag}/"]
    free = " ".join([*opening, free])
    begin = f"({free} BLANK?)?" if preamble.is_optional else f"{free} BLANK?"
    return "\n".join([" ".join(["start:", begin, *lead, "@bound"]), r"BLANK: /\n{1,2}/", *rules])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid_grammar("it holds half of a surrogate pair") from None


def _literal(text: str) -> str:
    """A regular expression that matches only `text`."""
    return re.sub(r"[^A-Za-z0-9_]", lambda match: f"\\u{{{ord(match[0]):x}}}", text)


def _first_line(error: str) -> str:
    """llguidance's message without the grammar, which it repeats."""
    return re.split(r"\n|\s{2,}", error.strip())[0][:300]
