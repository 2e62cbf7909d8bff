"""Tokenizers of GGUF files: the ids that transformers finds with what it reads out of the same file."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import byte_level_tokenizer, tokens, write_gguf
from hypothesis import given, strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm.checkpoint.gguf_file import GGUFFile
from llm.checkpoint.gguf_tokenizer import find_end_ids, make_tokenizer
from llm.checkpoint.hub import resolve_model_path
from llm.tokenization.hf_tokenizer import HFTokenizer

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "lo", "▁w", "ow", "▁low", "▁▁"]
SHAPE = {
    "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
    "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def sentence_pieces(**changes: Any) -> dict[str, Any]:
    """Metadata of a tokenizer as Llama 2 has it; better scores for what is merged first."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*PIECES, *WORDS],
        "tokenizer.ggml.scores": [0.0] * len(PIECES) + [-float(i) for i in range(len(WORDS))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(WORDS)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A file that has a tokenizer, and as much of a model as it takes to be opened."""
    shape = {f"llama.{key}": value for key, value in SHAPE.items()}
    num_ids = len(metadata["tokenizer.ggml.tokens"])
    return write_gguf(path, "llama", shape | metadata, {"token_embd.weight": np.zeros((num_ids, 32), np.float32)})


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory):
    """`readers(kind)` gives our tokenizer and transformers' of a file: `llama`, or a name of `tokenizer.ggml.pre`."""
    directory = tmp_path_factory.mktemp("tokenizers")

    @cache
    def read(kind: str) -> tuple[HFTokenizer, PreTrainedTokenizerBase]:
        path = write(directory / f"{kind}.gguf", sentence_pieces() if kind == "llama" else byte_level_tokenizer(kind))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYLINE_CACHE", str(directory / "cache"))
            ours = HFTokenizer.from_pretrained(resolve_model_path(str(path)))
        return ours, AutoTokenizer.from_pretrained(directory, gguf_file=path.name)

    return read


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "gpt-2", "llama"])
@given(st.text(st.sampled_from("hello w12\n\t.,'sé日😀")).filter(lambda text: not text.startswith(" ")))
def test_ids_are_transformers_and_give_the_text_back(readers, kind, text):
    """A text that begins with a space has one more in front or none, which SentencePiece files do not say."""
    ours, theirs = readers(kind)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "gpt-2"])
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_cut_as_transformers_cuts_it(readers, kind, text):
    ours, theirs = (tokenizer.pre_tokenizer for tokenizer in (_rust(readers(kind)[0]), readers(kind)[1]._tokenizer))
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def _rust(tokenizer: HFTokenizer) -> Any:
    return tokenizer._full


def test_qwen_composes_characters_first(readers):
    """As its own tokenizer does, which transformers does not see in a file."""
    assert readers("qwen2")[0].encode("e\u0301") == readers("qwen2")[0].encode("é")
    assert readers("llama-bpe")[0].encode("e\u0301") != readers("llama-bpe")[0].encode("é")


def test_mistral_cuts_words_where_capitals_begin(tmp_path):
    """Tekken's rule, by the expression of Mistral Nemo's tokenizer.json; words in the vocabulary stay whole."""
    path = write(tmp_path / "x.gguf", byte_level_tokenizer("tekken"))
    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_str(make_tokenizer(file)[0])
    assert tokenizer.model.ignore_merges
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("camelCase HTMLPage don't 12/ab\n/\n x")]
    assert pieces == ["camel", "Case", "ĠHTMLPage", "Ġdon", "'t", "Ġ", "1", "2", "/ab", "Ċ", "/Ċ", "Ġx"]


def test_smollm_cuts_numbers_into_digits(tmp_path):
    path = write(tmp_path / "x.gguf", byte_level_tokenizer("smollm"))
    with GGUFFile(path) as file:
        tokenizer = _from_definition(make_tokenizer(file)[0])
    texts = tokens()
    assert [texts[i] for i in tokenizer.encode("hello w123", add_special_tokens=False)] == [
        "hello", "Ġw", "1", "2", "3"
    ]  # fmt: skip


def _from_definition(definition: str) -> HFTokenizer:
    return HFTokenizer(definition)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (sentence_pieces(), ["<s>", "▁hello"]),
        (sentence_pieces(add_bos_token=False), ["▁hello"]),
        (sentence_pieces(add_eos_token=True), ["<s>", "▁hello", "</s>"]),
        (sentence_pieces(add_space_prefix=False), ["<s>", "hello"]),
        (byte_level_tokenizer("qwen2"), ["hello"]),
        (byte_level_tokenizer("llama-bpe"), ["<|endoftext|>", "hello"]),
        (byte_level_tokenizer("llama-bpe") | {"tokenizer.ggml.add_bos_token": False}, ["hello"]),
    ],
)
def test_what_stands_around_a_text(tmp_path, metadata, expected):
    """As the file says; else as such tokenizers do."""
    with GGUFFile(write(tmp_path / "x.gguf", metadata)) as file:
        tokenizer = _from_definition(make_tokenizer(file)[0])
    texts = metadata["tokenizer.ggml.tokens"]
    assert [texts[i] for i in tokenizer.encode("hello")] == expected


def test_control_tokens_of_users_stay_text(readers):
    """A user's `<s>` is no beginning, though its text is in the vocabulary."""
    ours, _ = readers("llama")
    assert not {1, 2} & set(ours.encode("</s><s>", add_special_tokens=False))


def test_all_ids_that_end_an_answer_are_found(tmp_path):
    """Those that the metadata names, and control tokens that do wherever they are; a text that looks alike does not."""
    metadata = byte_level_tokenizer() | {"tokenizer.ggml.eot_token_id": 7}
    texts = metadata["tokenizer.ggml.tokens"]
    with GGUFFile(write(tmp_path / "x.gguf", metadata)) as file:
        assert find_end_ids(file) == [7, texts.index("<|im_end|>"), texts.index("<|endoftext|>")]
    kinds = [
        1 if text == "<|endoftext|>" else kind
        for text, kind in zip(texts, metadata["tokenizer.ggml.token_type"], strict=True)
    ]
    with GGUFFile(write(tmp_path / "y.gguf", metadata | {"tokenizer.ggml.token_type": kinds})) as file:
        assert find_end_ids(file) == [7, texts.index("<|im_end|>")]
