"""Structured output: grammars compiled for a tokenizer, by llguidance (https://github.com/guidance-ai/llguidance).

A grammar is compiled in a thread, while its request waits. From then on it allows or forbids tokens draw by draw, see
`llm.sampling.constraint`; what it allows is worked out beside the model's forward pass.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llm.errors import InvalidRequestError
from llm.sampling.constraint import Constraint
from llm.serving.schemas import Grammar, GrammarKind
from llm.tokenization.hf_tokenizer import HFTokenizer

MAX_GRAMMAR_CHARS = 256 << 10
_MAX_DEPTH = 64
_MAX_COMPILED = 128
_COMPILE_THREADS = 2
_JSON_OPTIONS = {
    # One space, or a new line and its indentation: without a bound a model may write white space for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": r"( |\n {0,40})?",
}
_LIMITS = LLParserLimits(
    # What one row may cost a step: about 4 ms of lexing and 1 ms of parsing, by the speeds in llguidance's
    # documentation. A request whose grammar needs more ends with an error.
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_grammar_size=100_000,
    max_lexer_states=50_000,
)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and remembers the last of them. Thread-safe.

    Args:
        tokenizer: of the model.
        vocab_size: columns of the model's logits; None for the tokenizer's own number of ids.
    """

    def __init__(self, tokenizer: HFTokenizer, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._lock = Lock()
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._threads = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="grammar")

    def start(self, grammar: Grammar, output_ids: SequenceOf[int] = ()) -> "Future[Constraint]":
        """Compile a grammar in a thread, unless that has been done; take in what an earlier engine generated.

        The future raises `InvalidRequestError` as `compile` does.
        """
        return self._threads.submit(self._constraint, grammar, output_ids)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """The grammar's matcher at its beginning, the caller's own.

        Raises:
            InvalidRequestError: there is no such grammar, or it is too large.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = LLMatcher(self._ll_tokenizer, to_llguidance(grammar), limits=_LIMITS)
            if compiled.is_error():
                raise invalid_grammar(_first_line(compiled.get_error()))
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

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        eos_ids = sorted(i for i in self._tokenizer.eos_token_ids if i < self._vocab_size)
        if not eos_ids:
            raise invalid_grammar("it needs a model with an end-of-sequence token; this one has none")
        return LLTokenizer(self._tokenizer.definition, n_vocab=self._vocab_size, eos_token=eos_ids)


def to_llguidance(grammar: Grammar) -> str:
    """The grammar in llguidance's own form.

    Raises:
        InvalidRequestError: it is too large or too deep, or no JSON where that is what it should be.
    """
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise invalid_grammar(f"it is longer than {MAX_GRAMMAR_CHARS} characters")
    match grammar.kind:
        case GrammarKind.JSON_OBJECT:
            return _from_schema({"type": "object"})
        case GrammarKind.JSON_SCHEMA:
            return _from_schema(_parse(grammar.text))
        case GrammarKind.CHOICE:
            choices = _parse(grammar.text)
            if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
                raise invalid_grammar("choices must be a list of strings that are not empty")
            return str(LLMatcher.grammar_from_regex("|".join(map(_literal, choices))))
        case GrammarKind.REGEX:
            return str(LLMatcher.grammar_from_regex(grammar.text))
        case GrammarKind.LARK:
            return str(LLMatcher.grammar_from_lark(grammar.text))


def _from_schema(schema: object) -> str:
    if not isinstance(schema, (dict, bool)):
        raise invalid_grammar("a JSON schema is an object")
    if isinstance(schema, dict) and _depth(schema) > _MAX_DEPTH:
        raise invalid_grammar(f"the schema is nested more than {_MAX_DEPTH} levels deep")
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS))  # type: ignore[arg-type]


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid_grammar("it is not valid JSON, or nested too deeply") from None


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def _literal(text: str) -> str:
    """A regular expression that matches `text` alone."""
    return re.sub(r"[^A-Za-z0-9_]", lambda match: f"\\u{{{ord(match[0]):x}}}", text)


def _first_line(error: str) -> str:
    """llguidance's message without the grammar that it repeats."""
    return re.split(r"\n|\s{2,}", error.strip())[0][:300]


def invalid_grammar(message: str) -> InvalidRequestError:
    """What is raised where a grammar cannot be followed."""
    return InvalidRequestError(f"grammar: {message}", param="grammar", code="invalid_grammar")
