"""Special tokens of a checkpoint, from all files in which generations of transformers have kept them.

`tokenizer.json` has most of them. Beside it there are `tokenizer_config.json` (`bos_token` and its kind,
`added_tokens_decoder`, `additional_special_tokens`, which transformers 5 calls `extra_special_tokens`), and, of older
versions, `special_tokens_map.json` and `added_tokens.json`. The rules are those of transformers'
`PreTrainedTokenizerBase.from_pretrained`: the two older files count where there is no `added_tokens_decoder`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as RustTokenizer

from llm.checkpoint.json_files import read_json_if_there, wrong_type
from llm.errors import CheckpointError

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_A_TOKEN = "text, or an object with its content"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a checkpoint's files say beside `tokenizer.json`.

    Attributes:
        named: `bos_token`, `eos_token`, … with their text.
        others: special tokens without a name.
        added: tokens by the ids that files give them.
        added_in: the file that does.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    added_in: Path | None = None

    @property
    def texts(self) -> frozenset[str]:
        """Text of all that are special."""
        return frozenset({*self.named.values(), *self.others})

    def add_to(self, tokenizer: RustTokenizer) -> bool:
        """Add those tokens that `tokenizer.json` lacks; True if there are any.

        Raises:
            CheckpointError: a token would get another id than its file says.
        """
        held = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        missing = [(i, token) for i, token in sorted(self.added.items()) if token.content not in held]
        for token_id, token in missing:
            tokenizer.add_tokens([token])
            found = tokenizer.token_to_id(token.content)
            if found != token_id:
                raise CheckpointError(
                    f"{self.added_in} gives {token.content!r} the id {token_id}, but in tokenizer.json it would be "
                    f"{found}; are both from the same checkpoint?"
                )
        held.update(token.content for _, token in missing)
        unnumbered = dict.fromkeys(text for text in (*self.named.values(), *self.others) if text and text not in held)
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in unnumbered])
        return bool(missing or unnumbered)


def read_special_tokens(directory: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """Read the files of a directory.

    Args:
        config: content of its `tokenizer_config.json`.

    Raises:
        ConfigError: a value has the wrong type; one line with file and key.
    """
    path = directory / CONFIG
    named, others = _read_names(config, path)
    if config.get("added_tokens_decoder") is not None:
        added, added_in = _read_decoder(config["added_tokens_decoder"], path), path
        older, _ = _read_names(read_json_if_there(directory / MAP), directory / MAP)
        # A name that the configuration leaves open; one that it sets to null is nobody's.
        named = {**{key: text for key, text in older.items() if key not in config}, **named}
    else:
        older, more = _read_names(read_json_if_there(directory / MAP), directory / MAP)
        named, others = {**named, **older}, [*others, *(text for text in more if text not in others)]
        added_in = directory / ADDED
        added = _read_added(read_json_if_there(added_in), added_in, {*named.values(), *others})
    return SpecialTokens(named, tuple(others), added, added_in)


def _read_names(content: Mapping[str, Any], path: Path) -> tuple[dict[str, str], list[str]]:
    """Special tokens by name, and those without."""
    named: dict[str, str] = {}
    for key, value in content.items():
        text = _text_of(value)
        if text is not None and key.endswith("_token"):
            named[key] = text
        elif value is not None and key in _STANDARD:
            raise wrong_type(path, key, value, _A_TOKEN)
    others: list[str] = []
    for key in _LISTS:
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, (list, dict)):
            raise wrong_type(path, key, value, "a list of tokens")
        texts = {
            name: _text_of(item) for name, item in (value.items() if isinstance(value, dict) else enumerate(value))
        }
        if None in texts.values():
            raise wrong_type(path, key, value, f"a list of tokens, each {_A_TOKEN}")
        found = {name: text for name, text in texts.items() if text is not None}
        named |= {name: text for name, text in found.items() if isinstance(name, str)}
        others += [text for text in found.values() if text not in others]
    return named, others


def _read_decoder(value: Any, path: Path) -> dict[int, AddedToken]:
    """Tokens of `added_tokens_decoder`: objects by their ids, which are written as text."""
    key = "added_tokens_decoder"
    if not isinstance(value, dict):
        raise wrong_type(path, key, value, "an object of tokens by their ids")
    tokens: dict[int, AddedToken] = {}
    for token_id, item in value.items():
        name = f"{key}.{token_id}"
        if not token_id.isascii() or not token_id.isdigit():
            raise wrong_type(path, key, token_id, "an object of tokens by their ids")
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise wrong_type(path, name, item, "an object with the token's content")
        flags = {flag: item[flag] for flag in _FLAGS if item.get(flag) is not None}
        for flag, is_on in flags.items():
            if not isinstance(is_on, bool):
                raise wrong_type(path, f"{name}.{flag}", is_on, "true or false")
        tokens[int(token_id)] = AddedToken(item["content"], **flags)
    return tokens


def _read_added(content: Mapping[str, Any], path: Path, special: set[str]) -> dict[int, AddedToken]:
    """Tokens of `added_tokens.json`: ids by their text."""
    tokens: dict[int, AddedToken] = {}
    for text, token_id in content.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise wrong_type(path, text, token_id, "the token's id")
        tokens[token_id] = AddedToken(text, special=text in special, normalized=text not in special)
    return tokens


def _text_of(value: Any) -> str | None:
    """Text of a token, written as such or as an object; None if it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
