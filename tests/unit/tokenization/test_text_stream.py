"""`TextStream` against an oracle that looks at the whole text."""

import random

import pytest
from hypothesis import given, strategies as st

from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer
from llm.tokenization.text_stream import TextStream


class PieceTokenizer(SimpleCharacterTokenizer):
    """Tokens of several characters, or of none."""

    def __init__(self, pieces: list[str]) -> None:
        super().__init__(["a"])
        self.pieces = pieces

    def token_text(self, token_id: int) -> str:
        return self.pieces[token_id]


def run(pieces: list[str], stop: list[str], min_tokens: int = 0, chunk: int = 1) -> tuple[str, str | None, int]:
    """Text, stop reason and number of tokens taken, after pushing the pieces `chunk` at a time."""
    stream = TextStream(PieceTokenizer(pieces), stop, min_tokens)
    text = ""
    for start in range(0, len(pieces), chunk):
        text += stream.push(range(start, min(start + chunk, len(pieces))))
        assert "".join(pieces).startswith(text)
    return text + stream.finish(), stream.stop_reason, stream.num_tokens


def oracle(pieces: list[str], stop: list[str], min_tokens: int) -> tuple[str, str | None, int]:
    """The first end of a stop string at a token that may stop; the longest of several that end there."""
    text = "".join(pieces)
    for end in range(1, len(text) + 1):
        num_tokens = next(n for n in range(len(pieces) + 1) if len("".join(pieces[:n])) >= end)
        found = [pattern for pattern in stop if text[:end].endswith(pattern)]
        if found and num_tokens >= min_tokens:
            pattern = max(found, key=len)
            return text[: end - len(pattern)], pattern, num_tokens
    return text, None, len(pieces)


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["aa", "ab"], ["aab"], ("a", "aab", 2)),
        (["he", "l", "lo wor", "ld"], ["lo w"], ("hel", "lo w", 3)),
        (["x", "STO", "P", "y"], ["STOP"], ("x", "STOP", 3)),
        (["x", "STO", "y"], ["STOP"], ("xSTOy", None, 3)),
        (["abc"], ["bc", "abc", "c"], ("", "abc", 1)),
        (["abc"], ["b", "abc"], ("a", "b", 1)),
        (["a", "b"], [], ("ab", None, 2)),
    ],
)
def test_stop_strings_across_token_borders(pieces, stop, expected):
    assert run(pieces, stop) == expected


def test_what_may_begin_a_stop_string_is_held_back_until_settled():
    pieces = ["one ST", "O", "re", " ST"]
    stream = TextStream(PieceTokenizer(pieces), ["STOP"])
    assert [stream.push([i]) for i in range(4)] == ["one ", "", "STOre", " "]
    assert stream.finish() == "ST"
    assert stream.finish() == ""


def test_after_a_stop_nothing_is_taken_or_shown():
    stream = TextStream(PieceTokenizer(["ab", "c", "d"]), ["b"])
    assert stream.push([0, 1]) == "a"
    assert stream.push([2]) == ""
    assert (stream.finish(), stream.stop_reason, stream.num_tokens) == ("", "b", 1)


def test_stop_strings_before_min_tokens_are_ordinary_text():
    assert run([".", ".", ".", "."], ["."], min_tokens=3) == ("..", ".", 3)
    assert run(["a", "b", "c", "a", "b"], ["ab"], min_tokens=3) == ("abc", "ab", 5)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.integers(0, 6),
    st.integers(1, 4),
)
def test_equals_the_oracle(pieces, stop, min_tokens, chunk):
    assert run(pieces, stop, min_tokens, chunk) == oracle(pieces, stop, min_tokens)


def test_a_long_stop_string_costs_no_more_a_character():
    """A stop string of 100,000 characters that nearly matches everywhere: linear, so done at once."""
    text = ["a" * 1000] * 200
    assert run(text, ["a" * 99_999 + "b"])[1:] == (None, 200)


def test_multi_byte_characters_and_stops_with_a_real_tokenizer(tokenizers):
    """Half a character is never shown; a stop string may follow one in the same token."""
    tokenizer = tokenizers["qwen"]
    ids = tokenizer.encode("naïve 東京 😀🎉 then STOP here")
    stream = TextStream(tokenizer, ["STOP"])
    shown = [stream.push([token_id]) for token_id in ids]
    assert "".join(shown) == "naïve 東京 😀🎉 then "
    assert not any("\ufffd" in text for text in shown)
    assert stream.num_tokens < len(ids)


def test_an_incomplete_character_at_the_end_is_dropped(tokenizers):
    tokenizer = tokenizers["qwen"]
    ids = tokenizer.encode("ok 🎉", add_special_tokens=False)
    stream = TextStream(tokenizer)
    text = stream.push(ids[:-1]) + stream.finish()
    assert text == "ok "


def test_random_ids_of_every_tokenizer(tokenizers):
    """A stream without stop strings shows what decoding the whole shows, up to an incomplete end."""
    rng = random.Random(0)
    for kind, tokenizer in tokenizers.items():
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(1, 40))]
            stream = TextStream(tokenizer)
            text = stream.push(ids) + stream.finish()
            whole = tokenizer.decode(ids)
            assert whole.startswith(text), kind
            assert kind == "words" or whole[len(text) :] in ("", "\ufffd"), kind
