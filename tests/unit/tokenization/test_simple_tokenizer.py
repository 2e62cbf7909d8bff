"""`SimpleCharacterTokenizer`: one id a character, and a defined outcome for everything else."""

import pytest

from llm.errors import ConfigError
from llm.tokenization.simple_tokenizer import SimpleCharacterTokenizer


def test_characters_of_the_alphabet_round_trip():
    tokenizer = SimpleCharacterTokenizer(["a", "b", "c"])
    assert tokenizer.encode("abcba") == [0, 1, 2, 1, 0]
    assert tokenizer.decode([0, 1, 2, 1, 0]) == "abcba"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (4, frozenset())


def test_other_characters_become_the_unknown_id_and_show_as_a_replacement_character():
    tokenizer = SimpleCharacterTokenizer(["a", "b", "c"])
    assert tokenizer.encode("Hello, a") == [3] * 7 + [0]
    assert tokenizer.decode(tokenizer.encode("Hi a")) == "\ufffd\ufffd\ufffda"


def test_ids_that_a_model_makes_up_decode_to_a_replacement_character():
    tokenizer = SimpleCharacterTokenizer(["a", "b", "c"])
    assert tokenizer.decode([0, 31999]) == "a\ufffd"
    decoder = tokenizer.new_decoder()
    assert [decoder.step(token_id) for token_id in (2, 17000, 3)] == ["c", "\ufffd", "\ufffd"]


@pytest.mark.parametrize("alphabet", [["a", "bc"], ["a", ""], ["a", "a"]])
def test_an_alphabet_that_is_none_is_refused(alphabet):
    with pytest.raises(ConfigError, match="alphabet holds"):
        SimpleCharacterTokenizer(alphabet)
