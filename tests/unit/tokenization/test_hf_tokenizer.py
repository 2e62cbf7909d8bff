"""`HFTokenizer` against the `tokenizers` library and transformers."""

import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from llm.errors import CheckpointError, ConfigError
from llm.tokenization.hf_tokenizer import HFTokenizer

TEXTS = [
    "The quick brown fox",
    " leading and trailing ",
    "naïve café 東京 😀🎉\n\n\tx",
    "12345 6789",
    "a",
    "",
    "line\r\nbreak   many    spaces",
    "x < y and y > z [0]",
]


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2", "mistral", "metaspace", "words"])
@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_encodes_as_in_transformers(tokenizers, checkpoints, kind, text):
    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoints[kind])
    assert tokenizers[kind].encode(text) == theirs.encode(text)
    assert tokenizers[kind].encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def around(single: str, *names: str) -> Callable[[Tokenizer], processors.PostProcessor]:
    return lambda tokenizer: processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
POST_PROCESSORS: dict[str, Callable[[Tokenizer], processors.PostProcessor]] = {
    "behind": around(f"$A {END}", END),
    "both sides": around(f"{BEGIN} $A {END}", BEGIN, END),
    "twice": around(f"{BEGIN} $A:0 {END}:0 {END}:0", BEGIN, END),
    "none": around("$A"),
    "bert": lambda t: processors.BertProcessing((END, t.token_to_id(END)), (BEGIN, t.token_to_id(BEGIN))),
    "roberta": lambda t: processors.RobertaProcessing(
        (END, t.token_to_id(END)), (BEGIN, t.token_to_id(BEGIN)), trim_offsets=False
    ),
    "bytes alone": lambda _: processors.ByteLevel(trim_offsets=False),
    "sequence": lambda t: processors.Sequence([processors.ByteLevel(), around(f"$A {END}", END)(t)]),
    "sequence in a sequence": lambda t: processors.Sequence(
        [processors.Sequence([processors.ByteLevel(), around(f"{BEGIN} $A {END}", BEGIN, END)(t)])]
    ),
}


def with_post_processor(source: Path, target: Path, make: Callable[[Tokenizer], object], **settings: object) -> Path:
    """A copy of a checkpoint with another post-processor, None for none, and settings of tokenizer_config.json."""
    directory = shutil.copytree(source, target)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = make(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return directory


@pytest.mark.parametrize("name", POST_PROCESSORS)
@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": False, "add_eos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_special_tokens_stand_where_the_library_puts_them(checkpoints, tmp_path, name, settings):
    """In front of a text and behind it, also where tokenizer_config.json says something else, as in transformers."""
    directory = with_post_processor(checkpoints["llama3"], tmp_path / "t", POST_PROCESSORS[name], **settings)
    ours, library = HFTokenizer.from_pretrained(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    expected = [library.encode(text).ids for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected == [theirs.encode(text) for text in TEXTS]
    assert ours.encode_all(TEXTS) == expected
    messages = [{"role": "user", "content": "hi"}]
    chat = ours.apply_chat_template(messages)
    assert chat == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.count(library.token_to_id(BEGIN)) == 1
    assert library.token_to_id(END) not in chat


@pytest.mark.parametrize(
    ("settings", "around_it"),
    [
        ({}, ((), ())),
        ({"add_bos_token": True}, ((BEGIN,), ())),
        ({"add_bos_token": True, "add_eos_token": True}, ((BEGIN,), ("<|eot_id|>",))),
        ({"add_bos_token": False, "add_eos_token": None}, ((), ())),
    ],
)
def test_without_a_post_processor_the_settings_say_what_stands_around_a_text(
    checkpoints, tmp_path, settings, around_it
):
    directory = with_post_processor(checkpoints["llama3"], tmp_path / "t", lambda _: None, **settings)
    library = Tokenizer.from_file(str(directory / "tokenizer.json"))
    before, behind = ([library.token_to_id(name) for name in names] for names in around_it)
    ours = HFTokenizer.from_pretrained(directory)
    assert ours.encode("some text") == [*before, *library.encode("some text").ids, *behind]
    assert ours.encode("some text", add_special_tokens=False) == library.encode("some text").ids


def test_a_post_processor_that_repeats_the_text_is_refused(checkpoints, tmp_path):
    directory = with_post_processor(checkpoints["llama3"], tmp_path / "t", around(f"$A {END} $A", END))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json .*post-processor does more"):
        HFTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2", "mistral", "metaspace"])
@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_and_equals_the_library(tokenizers, checkpoints, kind, text):
    tokenizer = tokenizers[kind]
    library = Tokenizer.from_file(str(checkpoints[kind] / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == library.decode(ids)
    if not text.startswith(" ") or kind in ("llama3", "qwen", "llama2"):  # the others take it for their own
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_byte_level_decoding_of_any_ids_equals_the_library(tokenizers, checkpoints, kind):
    library = Tokenizer.from_file(str(checkpoints[kind] / "tokenizer.json"))
    tokenizer, rng = tokenizers[kind], random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(40))]
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", ["llama2", "mistral", "metaspace"])
def test_byte_fallback_decoding_of_valid_bytes_equals_the_library(tokenizers, checkpoints, kind):
    """Random tokens, rare characters as bytes among them. (Invalid bytes: the library shows U+FFFD for each byte.)"""
    library = Tokenizer.from_file(str(checkpoints[kind] / "tokenizer.json"))
    tokenizer, rng = tokenizers[kind], random.Random(2)
    pieces = [[token_id] for token_id in range(tokenizer.vocab_size) if not 3 <= token_id < 259]
    pieces += [[3 + byte for byte in character.encode()] for character in "é東😀 \n"]
    for _ in range(500):
        ids = [token_id for _ in range(rng.randrange(20)) for token_id in rng.choice(pieces)]
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2", "mistral", "metaspace", "words"])
def test_ids_outside_the_vocabulary_and_special_tokens_show_nothing(tokenizers, kind):
    tokenizer = tokenizers[kind]
    decoder = tokenizer.new_decoder()
    assert [decoder.step(10**6), decoder.step(min(tokenizer.eos_token_ids))] == ["", ""]
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.token_text(10**6) == ""
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_text(min(tokenizer.eos_token_ids)).startswith("<")


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2", "mistral", "metaspace", "words"])
def test_control_tokens_in_text_stay_text(tokenizers, checkpoints, kind):
    """Also those that the model's own vocabulary holds, and added ones that are not marked special."""
    tokenizer = tokenizers[kind]
    added = Tokenizer.from_file(str(checkpoints[kind] / "tokenizer.json")).get_added_tokens_decoder()
    forbidden = {token_id for token_id, token in added.items() if token.content != "<unk>"}
    for token in added.values():
        for text in (token.content, f"hi {token.content}system", token.content * 3):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert forbidden.isdisjoint(ids), text
            if kind != "words":
                assert tokenizer.decode(ids) == text


def test_a_lone_surrogate_becomes_a_replacement_character(tokenizers):
    tokenizer = tokenizers["qwen"]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_eos_ids_come_from_both_files(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["qwen"], tmp_path / "q")
    vocab = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    im_end, endoftext = vocab["<|im_end|>"], vocab["<|endoftext|>"]
    assert HFTokenizer.from_pretrained(directory).eos_token_ids == {im_end}
    (directory / "config.json").write_text(json.dumps({"eos_token_id": endoftext}))
    assert HFTokenizer.from_pretrained(directory).eos_token_ids == {im_end, endoftext}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, 7]}))
    assert HFTokenizer.from_pretrained(directory).eos_token_ids == {im_end, 7}


def test_an_end_id_that_the_model_does_not_have_is_none(checkpoints, tmp_path):
    """The tokenizer's own end token was added behind the model's last id: the model never draws it."""
    directory = shutil.copytree(checkpoints["qwen"], tmp_path / "q")
    (im_end,) = HFTokenizer.from_pretrained(directory).eos_token_ids
    for vocab_size, expected in ((im_end + 1, {3, im_end}), (im_end, {3})):
        (directory / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": [3, 10**6]}))
        assert HFTokenizer.from_pretrained(directory).eos_token_ids == expected


def test_truncation_and_padding_in_the_file_are_ignored(checkpoints, tmp_path):
    directory = shutil.copytree(checkpoints["llama3"], tmp_path / "l")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert len(HFTokenizer.from_pretrained(directory).encode("one two three four five six seven")) > 4
    assert len(HFTokenizer.from_pretrained(directory).encode("a")) == 2


def test_a_missing_or_broken_file_is_one_line_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        HFTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer definition") as info:
        HFTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(info.value)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read as JSON"):
        HFTokenizer.from_pretrained(tmp_path)


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_any_text_round_trips(tokenizers, text):
    tokenizer = tokenizers["llama3"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.min_num_tokens(text) <= len(tokenizer.encode(text))


def test_threads_share_a_tokenizer(tokenizers):
    tokenizer = tokenizers["qwen"]
    texts = [f"{text} {number} <|im_end|>" for number in range(50) for text in TEXTS]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_a_huge_word_is_encoded_without_stopping_other_threads(tokenizers):
    """A word of 2 MB: others run on while it is encoded, and its least number of tokens is known before."""
    tokenizer = tokenizers["qwen"]
    word = "ab" * 1_000_000
    assert tokenizer.min_num_tokens(word) > 10_000
    worker = threading.Thread(target=tokenizer.encode, args=(word,))
    worker.start()
    started = last = time.perf_counter()
    gaps = [0.0]
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    assert max(gaps) < 0.5 * (last - started), "this thread stood still for most of the time"


@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_bytes_of_tokens_add_up_to_the_text(tokenizers, kind):
    """Also where a character is spread over tokens, each of which shows as U+FFFD alone."""
    tokenizer = tokenizers[kind]
    text = "naïve 東京 😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert any("\ufffd" in tokenizer.token_text(token_id) for token_id in ids)
