"""Reading a `tokenizer.json`, and changes to its content."""

import json
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import read_text
from llm.errors import CheckpointError

_OTHER_DEFINITIONS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of other tokenizers, which transformers makes a `tokenizer.json` of."""


def without_control_tokens(definition: str, control_ids: Collection[int], model_vocab: Mapping[str, int]) -> str:
    """The tokenizer with control tokens that no text matches.

    The library numbers added tokens in order, so those past the model's own vocabulary are renamed, not removed.

    Args:
        control_ids: ids of the control tokens.
        model_vocab: ids by text, without added tokens.
    """
    changed = json.loads(definition)
    secret = secrets.token_hex(16)
    changed["added_tokens"] = [
        {**token, "content": f"{secret}-{token['id']}"} if token["id"] in control_ids else token
        for token in changed["added_tokens"]
        if token["id"] not in control_ids or token["content"] not in model_vocab
    ]
    return json.dumps(_bare(changed))


def with_ids_below(definition: str, num_ids: int) -> str:
    """The tokenizer with its first `num_ids` ids alone, for a model that has no more."""
    changed = json.loads(definition)
    changed["added_tokens"] = [token for token in changed["added_tokens"] if token["id"] < num_ids]
    model = changed["model"]
    vocab = model["vocab"]
    if not isinstance(vocab, dict):  # Unigram: pieces with their scores, in the order of their ids
        model["vocab"] = vocab[:num_ids]
        return json.dumps(_bare(changed))
    model["vocab"] = kept = {text: token_id for text, token_id in vocab.items() if token_id < num_ids}
    if "merges" in model and len(kept) < len(vocab):
        model["merges"] = [merge for merge in model["merges"] if _is_in(merge, kept)]
    return json.dumps(_bare(changed))


def _is_in(merge: str | list[str], vocab: Mapping[str, int]) -> bool:
    """Whether what a merge joins, and what it makes, is in the vocabulary."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in vocab and right in vocab and left + right in vocab


def _bare(definition: dict[str, Any]) -> dict[str, Any]:
    return {**definition, "post_processor": None, "truncation": None, "padding": None}


def read_definition(path: Path) -> str:
    """The content of a `tokenizer.json`.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({_instead_of(path) or error}); {_save_one(path)}") from error


def _instead_of(path: Path) -> str:
    """The file that a directory has in place of `tokenizer.json`, as a sentence; nothing where there is none."""
    found = next((name for name in _OTHER_DEFINITIONS if (path.parent / name).exists()), None)
    return "" if path.exists() or found is None else f"there is only {found}"


def _save_one(path: Path) -> str:
    """How to get a `tokenizer.json`."""
    return (
        f"make one with transformers (and sentencepiece, tiktoken or mistral_common): "
        f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained({str(path.parent)!r})"
    )
