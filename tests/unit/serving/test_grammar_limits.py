"""What a grammar allows exactly: numbers, classes of characters, references; and what is refused instead."""

import json
import time
from typing import Any

import jsonschema
import pytest
from test_grammar import DEMO, from_schema

from llm.errors import InvalidRequestError
from llm.sampling.grammar import GrammarCompiler
from llm.serving.schemas import Grammar, GrammarKind, Preamble
from llm.tokenization.hf_tokenizer import HFTokenizer

BIG = 1234567890123456789
"""The nearest double is 1234567890123456768."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(HFTokenizer.from_pretrained(DEMO))


def allows(compiler: GrammarCompiler, grammar: Grammar, answer: str | list[int]) -> bool:
    """Whether an answer is whole by a grammar. The demo's tokens are bytes."""
    matcher = compiler.compile(grammar)
    ids = list(answer.encode()) if isinstance(answer, str) else answer
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def regex(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.REGEX, text=text)


LARGE: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "enum": ({"enum": [BIG, "x"]}, [BIG, "x"], [BIG - 21, BIG + 1]),
    "constant": ({"const": -BIG}, [-BIG], [BIG, -BIG + 21]),
    "past 64 bits": ({"const": 2**80 + 1}, [2**80 + 1], [2**80]),
    "of a type": ({"type": ["integer", "null"], "enum": [BIG, "x", None]}, [BIG, None], ["x"]),
    "in a list": ({"const": [BIG, {"a": 1.5}]}, [[BIG, {"a": 1.5}]], [[BIG]]),
    "a property": (
        {"type": "object", "properties": {"id": {"const": BIG}, "name": {"type": "string"}}, "required": ["id"]},
        [{"id": BIG}, {"id": BIG, "name": "a"}],
        [{"id": BIG + 1}, {"name": "a"}, {}],
    ),
    "optional properties": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "id": {"const": BIG}, "b": {"type": "integer"}},
            "additionalProperties": False,
        },
        [{}, {"a": 1}, {"id": BIG}, {"b": 2}, {"a": 1, "b": 2}, {"a": 1, "id": BIG, "b": 2}],
        [{"id": 1}, {"c": 1}],
    ),
    "items": (
        {"type": "array", "items": {"enum": [BIG, 1]}, "minItems": 1, "maxItems": 3},
        [[BIG], [1, BIG], [1, 1, BIG]],
        [[], [2], [1, 1, 1, 1]],
    ),
    "any number of items": ({"type": "array", "items": {"const": BIG}}, [[], [BIG], [BIG] * 5], [[1]]),
    "behind references": (
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"id": {"$ref": "#/$defs/id"}, "next": {"$ref": "#/$defs/node"},
                                   "tag": {"$ref": "#/$defs/tag"}},
                    "required": ["id"],
                },
                "id": {"anyOf": [{"const": BIG}, {"type": "null"}]},
                "tag": {"type": "string", "pattern": "^[a-z]$"},
            },
        },
        [{"id": BIG}, {"id": None, "next": {"id": BIG, "tag": "q"}}],
        [{"id": 3}, {"id": BIG, "tag": "Q"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_integers_are_exact(compiler: GrammarCompiler, name: str):
    schema, inside, outside = LARGE[name]
    for value in inside:
        jsonschema.validate(value, schema)
        for separators in ((",", ":"), (", ", ": ")):
            text = json.dumps(value, separators=separators)
            if separators == (", ", ": ") or "list" not in name:
                assert allows(compiler, from_schema(schema), text), text
    for value in outside:
        assert not allows(compiler, from_schema(schema), json.dumps(value)), value


BOUNDS: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "of 64 bits": (
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63},
        [0, 7, -7, BIG, 2**63 - 1024],
        [2**63 + 1, -(2**64)],
    ),
    "of 64 bits, exclusive": (
        {"type": "integer", "exclusiveMinimum": -(2**63), "exclusiveMaximum": 2**63}, [0, BIG], [2**63, -(2**63)],
    ),
    "that no double holds": (
        {"type": "integer", "minimum": BIG, "maximum": BIG + 10_000}, [BIG + 5000], [BIG - 1, BIG - 21, BIG + 10_001],
    ),
    "exclusive, at a double": ({"type": "integer", "exclusiveMinimum": 2**60}, [2**60 + 5000], [2**60, 2**60 - 1]),
    "far below": ({"type": "integer", "maximum": -(2**60)}, [-(2**60), -BIG], [-(2**60) + 1, 5]),
    "of numbers": ({"type": "number", "minimum": -(2**63), "maximum": 2**64}, [0.5, 3], [-(2**65)]),
    "far away": ({"type": "integer", "minimum": 0, "maximum": 10**400}, [0, BIG], [-1]),
    "a double": ({"type": "number", "minimum": 0, "maximum": 1e300}, [0.5], [-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_are_never_passed(compiler: GrammarCompiler, name: str):
    schema, inside, outside = BOUNDS[name]
    for value in inside:
        assert allows(compiler, from_schema(schema), json.dumps(value)), value
    for value in outside:
        assert not allows(compiler, from_schema(schema), json.dumps(value)), value


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (r"\d+", ["0123456789"], ["٣", "१"]),
        (r"[\d.]+", ["1.5"], ["٣"]),
        (r"\D", ["a", "٣"], ["5"]),
        (r"\w+", ["aZ_9"], ["é", "٣"]),
        (r"[^\W\d]", ["a", "_"], ["5", "é"]),
        (r"\s", [" ", "\t", "\u00a0", "\u2028"], ["a"]),
        (r"\\d", ["\\d"], ["\\5"]),
        (r"[\w-]+@\w+\.com", ["a-b@c.com"], ["é@c.com"]),
    ],
)
def test_classes_of_characters_are_ecmas(compiler: GrammarCompiler, text: str, inside: list[str], outside: list[str]):
    """In a regular expression by itself as in a schema's pattern."""
    schema = from_schema({"type": "string", "pattern": f"^{text}$"})
    for answer in inside:
        assert allows(compiler, regex(text), answer), answer
        assert allows(compiler, schema, json.dumps(answer, ensure_ascii=False)) or answer in "\t\\d"
    for answer in outside:
        assert not allows(compiler, regex(text), answer), answer
        assert not allows(compiler, schema, json.dumps(answer, ensure_ascii=False)), answer


def looping(levels: int) -> dict[str, Any]:
    """References one behind the other, the last of them back to the first."""
    nodes = {f"n{i}": {"$ref": f"#/$defs/n{(i + 1) % levels}"} for i in range(levels)}
    return {"$ref": "#/$defs/n0", "$defs": nodes}


def crossed(levels: int) -> dict[str, Any]:
    """Each refers to all others."""
    every = [{"$ref": f"#/$defs/n{i}"} for i in range(levels)]
    return {"allOf": every, "$defs": {f"n{i}": {"allOf": every[i + 1 :]} for i in range(levels)}}


REFUSED: dict[str, Grammar] = {
    "a reference to itself": from_schema({"$ref": "#"}),
    "an empty reference": from_schema({"$ref": ""}),
    "a loop": from_schema(looping(3)),
    "a long loop": from_schema(looping(2000)),
    "references without number": from_schema(crossed(300)),
    "a property that never ends": from_schema(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "items that never end": from_schema({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    "nothing": from_schema(False),
    "NaN": Grammar(kind="json_schema", text='{"const": NaN}'),
    "infinity": Grammar(kind="json_schema", text='{"maximum": 1e999}'),
    "half a surrogate": Grammar(kind="json_schema", text='{"enum": ["\\ud800"]}'),
    "half a surrogate in a key": Grammar(kind="json_schema", text='{"properties": {"\\udc00": {}}}'),
    "half a surrogate, as it is": Grammar(kind="json_schema", text='{"enum": ["\ud800"]}'),
    "half a surrogate in a regex": regex("a\ud800"),
    "half a surrogate in a choice": Grammar(kind="choice", text='["\\ud800"]'),
    "half a surrogate in a grammar": Grammar(kind="lark", text='start: "\ud800"'),
    "above 64 bits": from_schema({"type": "integer", "minimum": 2**64}),
    "no integer between": from_schema({"type": "integer", "minimum": BIG, "maximum": BIG}),
    "large beside what cannot be": from_schema({"const": BIG, "multipleOf": 3}),
    "large under oneOf": from_schema({"oneOf": [{"const": BIG}, {"type": "string"}]}),
    "unique items": from_schema({"type": "array", "uniqueItems": True}),
    "unknown format": from_schema({"type": "string", "format": "zip"}),
    "a number as a schema": from_schema(5),
    "an enum that is no list": from_schema({"enum": BIG}),
    "required, but what": from_schema({"type": "object", "properties": {"a": {"const": BIG, "required": True}}}),
    "a reference that is no text": from_schema({"anyOf": [{"$ref": [1]}]}),
    "properties that are a list": from_schema({"properties": ["a"]}),
    "a number of items below nothing": from_schema({"type": "array", "minItems": -1}),
    "a text as a schema": Grammar(kind="json_schema", text='"NaN"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_answer_can_fit_is_refused(compiler: GrammarCompiler, name: str):
    started = time.process_time()
    with pytest.raises(InvalidRequestError, match="grammar: ") as caught:
        compiler.compile(REFUSED[name])
    assert time.process_time() - started < 1
    assert caught.value.code == "invalid_grammar"


def test_references_that_end_are_followed(compiler: GrammarCompiler):
    tree = from_schema({"type": "object", "properties": {"left": {"$ref": "#"}}, "additionalProperties": False})
    assert allows(compiler, tree, '{"left": {"left": {}}}')
    stuck = from_schema({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}, "b": {"const": 1}},
                         "additionalProperties": False})  # fmt: skip
    assert allows(compiler, stuck, '{"b": 1}')
    assert compiler.compile(stuck).validate_tokens(list(b'{"a')) < 3, "a property that cannot end is left out"
    assert allows(compiler, from_schema(True), '[1, {"a": null}]')


def test_options_of_the_compiler_are_not_for_requests(compiler: GrammarCompiler):
    schema = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(InvalidRequestError, match="uniqueItems"):
        compiler.compile(from_schema(schema))


@pytest.mark.parametrize(
    "keywords",
    [
        {"uniqueItems": True},
        {"contains": {"type": "integer"}},
        {"not": {"type": "string"}},
        {"if": {"type": "string"}, "then": {"minLength": 3}},
        {"format": "zip"},
        {"pattern": "^(?=a)b$"},
        {"patternProperties": {"^(?!x)a": {"type": "string"}}},
        {"propertyNames": {"pattern": "^a"}},
        {"dependentRequired": {"a": ["b"]}},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"unevaluatedProperties": False},
        {"required": True},
    ],
)
def test_leniently_what_cannot_be_followed_is_left_out(compiler: GrammarCompiler, keywords: dict[str, Any]):
    schema = {"type": "object", "properties": {"a": keywords, "n": {"type": "integer"}}, "required": ["n"]}
    with pytest.raises(InvalidRequestError):
        compiler.compile(from_schema(schema))
    lenient = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema), is_lenient=True)
    assert allows(compiler, lenient, '{"n": 1}')
    assert not allows(compiler, lenient, '{"n": "x"}'), "the rest holds"


THOUGHTS = Preamble(opening="<think>", closing="</think>", is_optional=True)


@pytest.mark.parametrize(
    "bound",
    [
        from_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}),
        from_schema({"type": "object", "properties": {"a": {"const": BIG}}}),
        regex(r'\{"a": [0-9]+\}'),
        Grammar(kind=GrammarKind.CHOICE, text='["{\\"a\\": 1234567890123456789}"]'),
        Grammar(kind=GrammarKind.LARK, text=r'start: "{\"a\": " /[0-9]+/ "}"'),
    ],
)
def test_thoughts_are_free_and_then_the_grammar_binds(compiler: GrammarCompiler, bound: Grammar):
    answer = f'{{"a": {BIG}}}'
    optional = bound.model_copy(update={"preamble": THOUGHTS})
    for begin in ("", "<think></think>", "<think>\nIs 3 < 4 > 2? </thin\n</think>\n\n", "<think>ä</think>\n"):
        assert allows(compiler, optional, begin + answer), begin
    assert not allows(compiler, optional, "thoughts" + answer)
    assert not allows(compiler, optional, "<think>never closed " + answer)
    opened = bound.model_copy(update={"preamble": Preamble(closing="</think>")})
    assert allows(compiler, opened, "Hm.</think>" + answer)
    assert not allows(compiler, opened, answer), "the prompt has opened the thoughts, so they must be closed"
    assert not allows(compiler, opened, "Hm.</think>no" + answer)


def test_thoughts_between_special_tokens(compiler: GrammarCompiler):
    """262 and 263 are special tokens of the demo, which no text makes."""
    channels = Preamble(
        opening="<|reserved_0|>analysis", closing="<|reserved_1|>", lead="<|reserved_0|>final", is_optional=True
    )
    bound = Grammar(kind=GrammarKind.JSON_OBJECT, preamble=channels)
    thoughts = [262, *b"analysis", *b"Hm. <|reserved_1|>", 263]
    assert allows(compiler, bound, [*thoughts, 262, *b"final", *b"{}"])
    assert allows(compiler, bound, [262, *b"final", *b"{}"])
    assert not allows(compiler, bound, list(b"{}"))
    assert not allows(compiler, bound, list(b"<|reserved_0|>final{}"))


@pytest.mark.parametrize("is_special", [True, False])
def test_added_tokens_stand_for_their_text(is_special: bool):
    """Qwen3 has `<think>` as tokens that are not marked special, DeepSeek as special ones; neither is text."""
    definition = json.loads((DEMO / "tokenizer.json").read_text())
    for token, text in zip(definition["added_tokens"][-2:], ("<think>", "</think>"), strict=True):
        token |= {"content": text, "special": is_special}
    compiler = GrammarCompiler(HFTokenizer(json.dumps(definition), eos_token_ids=[257]))
    bound = Grammar(kind=GrammarKind.JSON_OBJECT, preamble=THOUGHTS)
    assert allows(compiler, bound, [262, *b"Hm.", 263, *b"\n\n{}"])
    assert allows(compiler, bound, "{}")
    assert not allows(compiler, bound, [262, *b"Hm.", 263, *b"x"])
    assert not allows(compiler, bound, [262, *b"Hm.", 262, 263, *b"{}"])
