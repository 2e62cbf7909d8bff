"""Special tokens from each file that a generation of transformers keeps them in; always as transformers reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llm.errors import CheckpointError, ConfigError
from llm.sampling.grammar import GrammarCompiler
from llm.serving.schemas import Grammar, GrammarKind
from llm.tokenization.hf_tokenizer import HFTokenizer

BEGIN, END = "<|begin_of_text|>", "<|eot_id|>"
TEXTS = ["hello <|end_of_text|> you", "plain", "a<tool>b</tool> <|im_end|>"]
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def directory(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A Llama 3 tokenizer, whose files may be changed."""
    return Path(shutil.copytree(checkpoints["llama3"], tmp_path / "llama3"))


def write(directory: Path, **files: dict[str, Any] | None) -> None:
    """Write JSON files by their names; None for no file."""
    for name, content in files.items():
        path = directory / f"{name}.json"
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(json.dumps(content))


def config_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "tokenizer_config.json").read_text()))


def without_added(directory: Path, *texts: str) -> dict[str, int]:
    """Take added tokens out of tokenizer.json, the last ones; their ids."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    taken = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] in texts}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in texts]
    path.write_text(json.dumps(content))
    return taken


def assert_as_in_transformers(directory: Path) -> HFTokenizer:
    """Ids of the special tokens, of a chat and of what they leave out of decoded text."""
    ours, theirs = HFTokenizer.from_pretrained(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == {theirs.eos_token_id}
    chat = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(CHAT) == chat
    everything = list(range(ours.vocab_size))
    # Other than transformers 4, 5 shows a special token that only added_tokens.json numbers.
    shown = theirs.decode(everything, skip_special_tokens=True).replace("<|end_header_id|>", "")
    assert ours.decode(everything) == shown
    assert ours.encode("on photosynthesis, say") == theirs.encode("on photosynthesis, say")
    for text in TEXTS:
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    return ours


def bos_and_eos_in_the_map(directory: Path) -> None:
    names = config_of(directory)
    kept = {key: value for key, value in names.items() if key not in ("bos_token", "eos_token")}
    as_object = {"content": END, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write(directory, tokenizer_config=kept, special_tokens_map={"bos_token": BEGIN, "eos_token": as_object})


def no_configuration_but_the_map(directory: Path) -> None:
    template = config_of(directory)["chat_template"]
    (directory / "chat_template.jinja").write_text(template)
    write(directory, tokenizer_config=None, special_tokens_map={"bos_token": BEGIN, "eos_token": END})


def the_map_wins(directory: Path) -> None:
    config = {**config_of(directory), "eos_token": "<|end_of_text|>"}
    write(directory, tokenizer_config=config, special_tokens_map={"eos_token": END})


def ids_in_the_configuration(directory: Path) -> None:
    taken = without_added(directory, "<|end_header_id|>", END)
    decoder = {
        str(i): {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                 "special": True}
        for text, i in taken.items()
    }  # fmt: skip
    write(directory, tokenizer_config={**config_of(directory), "added_tokens_decoder": decoder})


def ids_in_a_file_of_their_own(directory: Path) -> None:
    taken = without_added(directory, "<|end_header_id|>", END)
    write(
        directory,
        added_tokens=taken,
        special_tokens_map={"eos_token": END, "additional_special_tokens": ["<|end_header_id|>"]},
    )


def words_in_a_file_of_their_own(directory: Path) -> None:
    """Vocabulary, not control."""
    write(directory, added_tokens={"photosynthesis": HFTokenizer.from_pretrained(directory).vocab_size})


def additional_tokens(directory: Path) -> None:
    without_added(directory, END)
    tool = {"__type": "AddedToken", "content": "<tool>", "special": True}
    config = {**config_of(directory), "additional_special_tokens": [END, tool]}
    write(directory, tokenizer_config=config)


def extra_tokens_of_transformers_5(directory: Path) -> None:
    without_added(directory, END)
    write(directory, tokenizer_config={**config_of(directory), "extra_special_tokens": [END, "<tool>"]})


def named_extra_tokens(directory: Path) -> None:
    extra = {"image_token": "<|image|>", "end_token": END}
    write(directory, tokenizer_config={**config_of(directory), "extra_special_tokens": extra})


def a_name_that_no_file_numbers(directory: Path) -> None:
    write(directory, tokenizer_config={**config_of(directory), "pad_token": "<|pad|>"})


PLACES: list[Callable[[Path], None]] = [
    bos_and_eos_in_the_map, no_configuration_but_the_map, the_map_wins, ids_in_the_configuration,
    ids_in_a_file_of_their_own, words_in_a_file_of_their_own, additional_tokens, extra_tokens_of_transformers_5,
    named_extra_tokens, a_name_that_no_file_numbers,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_each_place_is_read_as_in_transformers(directory, place):
    place(directory)
    assert_as_in_transformers(directory)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2", "mistral"])
def test_what_todays_transformers_saves(checkpoints, tmp_path, kind):
    PreTrainedTokenizerFast.from_pretrained(checkpoints[kind]).save_pretrained(tmp_path)
    saved, original = HFTokenizer.from_pretrained(tmp_path), HFTokenizer.from_pretrained(checkpoints[kind])
    assert saved.eos_token_ids == original.eos_token_ids
    assert saved.apply_chat_template(CHAT) == original.apply_chat_template(CHAT)
    assert saved.encode("naïve text") == original.encode("naïve text")


def test_a_name_that_the_configuration_sets_to_null_is_nobodys(directory):
    """An older file beside `added_tokens_decoder` fills in what the configuration does not speak of, no more."""
    config = {**config_of(directory), "bos_token": None, "added_tokens_decoder": {}}
    config["chat_template"] = "{{ bos_token is defined }} {{ pad_token }}"
    write(directory, tokenizer_config=config, special_tokens_map={"bos_token": BEGIN, "pad_token": END})
    tokenizer = HFTokenizer.from_pretrained(directory)
    assert tokenizer.render_chat(CHAT).text == f"False {END}"


def test_an_id_that_tokenizer_json_cannot_give_is_refused(directory):
    """Else the model would read another token than it was trained with."""
    write(directory, added_tokens={"<|late|>": 900})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json gives .* the id 900, but .* would be \d+"):
        HFTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("num_missing", [1, 3, 20])
@pytest.mark.parametrize("kind", ["llama3", "qwen"])
def test_grammars_of_a_tokenizer_that_is_larger_than_the_model(checkpoints, kind, num_missing):
    """Special tokens, and whole merges, past the model's last id: the others are allowed as ever."""
    tokenizer = HFTokenizer(
        HFTokenizer.from_pretrained(checkpoints[kind]).definition, eos_token_ids=[number_of_eos(checkpoints[kind]), 3]
    )
    vocab_size = tokenizer.vocab_size - num_missing
    grammar = Grammar(kind=GrammarKind.REGEX, text="yes|no")
    matcher = GrammarCompiler(tokenizer, vocab_size).compile(grammar)
    expected = GrammarCompiler(tokenizer).compile(grammar)
    mask, whole = matcher.compute_bitmask(), expected.compute_bitmask()
    assert len(mask) == -(-vocab_size // 32) * 4
    bits = {i for i in range(vocab_size) if mask[i // 8] >> i % 8 & 1}
    assert bits == {i for i in range(vocab_size) if whole[i // 8] >> i % 8 & 1}
    assert bits


def number_of_eos(directory: Path) -> int:
    return min(HFTokenizer.from_pretrained(directory).eos_token_ids)


BAD: list[tuple[str, str, Any]] = [
    ("tokenizer_config", "bos_token", 5), ("tokenizer_config", "eos_token", {"content": 5}),
    ("tokenizer_config", "eos_token", ["x"]), ("tokenizer_config", "chat_template", 5),
    ("tokenizer_config", "chat_template", ["x"]), ("tokenizer_config", "chat_template", {"name": "default"}),
    ("tokenizer_config", "chat_template", [{"name": "default", "template": None}]),
    ("tokenizer_config", "added_tokens_decoder", ["x"]), ("tokenizer_config", "added_tokens_decoder", {"x": {}}),
    ("tokenizer_config", "added_tokens_decoder", {"5": "x"}),
    ("tokenizer_config", "added_tokens_decoder", {"5": {"content": "x", "special": "yes"}}),
    ("tokenizer_config", "additional_special_tokens", "x"), ("tokenizer_config", "extra_special_tokens", [5]),
    ("special_tokens_map", "eos_token", 5), ("special_tokens_map", "additional_special_tokens", [None]),
    ("added_tokens", "x", "5"), ("added_tokens", "x", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), BAD)
def test_values_of_the_wrong_type_are_one_line_with_file_and_key(directory, name, key, value):
    path = directory / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, key: value}))
    with pytest.raises(ConfigError, match=rf"^{path}: '{key}") as caught:
        HFTokenizer.from_pretrained(directory)
    assert "\n" not in str(caught.value)


def test_a_template_file_that_is_no_text(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja cannot be read"):
        HFTokenizer.from_pretrained(directory)


def test_a_template_of_an_older_processor(directory):
    config = config_of(directory)
    template = config.pop("chat_template")
    write(directory, tokenizer_config=config, chat_template={"chat_template": template})
    assert HFTokenizer.from_pretrained(directory).render_chat(CHAT).text.startswith(BEGIN)
