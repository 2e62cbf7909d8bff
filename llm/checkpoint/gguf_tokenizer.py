"""The tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json of a Hugging Face checkpoint.

A file holds the vocabulary, and the name of the rule by which text is cut before tokens are looked for (the names are
llama.cpp's, in src/llama-vocab.cpp). The rules here are those of the tokenizers that the names stand for.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llm.checkpoint.gguf_file import GGUFFile
from llm.errors import CheckpointError

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
"""Types of tokens, of those that there are."""
_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_PADDING = re.compile(r"\[PAD\d+\]")
_SPACE = "▁"
_END_OF_TURN = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<|call|>",
    "<EOT>", "[EOT]", "_<EOT>",
})  # fmt: skip
"""Control tokens that end an answer wherever a vocabulary has them."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_CUTS = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST))
_QWEN2_CUTS = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST))
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD, _TEKKEN_REST = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_CUTS = "|".join((
    f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+", f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*", r"\p{N}", _TEKKEN_REST,
))  # fmt: skip
_LLAMA3_NAMES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3"})
_CUTS: Mapping[str, str] = {
    **dict.fromkeys(_LLAMA3_NAMES, _LLAMA3_CUTS),
    "smaug-bpe": _LLAMA3_CUTS,
    "qwen2": _QWEN2_CUTS,
    "tekken": _TEKKEN_CUTS,
    "deepseek-r1-qwen": _QWEN2_CUTS,
}
_WITH_WHOLE_WORDS = _LLAMA3_NAMES | {"tekken"}
"""Vocabularies in which a word that is a token is not put together of others."""
_CUTS_BY_GPT2 = frozenset({"gpt-2", "smollm"})


def make_tokenizer(file: GGUFFile) -> tuple[str, dict[str, Any]]:
    """Content of tokenizer.json and of tokenizer_config.json.

    Raises:
        CheckpointError: the file has no vocabulary, or one of a kind that is not supported.
    """
    tokens = _tokens(file)
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif kind == "llama":
        tokenizer = _sentence_pieces(file, tokens)
    else:
        raise CheckpointError(f"{file.path}: tokenizer {kind!r} is not supported; supported: gpt2, llama")
    _add_tokens(tokenizer, file, tokens)
    named = {
        name: tokens[token_id]
        for name, key in _NAMED_TOKENS.items()
        if (token_id := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and token_id < len(tokens)
    }
    _put_around_texts(tokenizer, file, named)
    return tokenizer.to_str(), {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def find_end_ids(file: GGUFFile) -> list[int]:
    """Ids with which the model ends an answer."""
    found = {file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    tokens = _tokens(file)
    kinds = enumerate(_types(file, len(tokens)))
    found |= {token_id for token_id, kind in kinds if kind == _CONTROL and tokens[token_id] in _END_OF_TURN}
    return sorted(token_id for token_id in found if token_id is not None)


def _tokens(file: GGUFFile) -> list[str]:
    """Texts of all tokens by id, but for those that only fill the vocabulary up."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{file.path} has no vocabulary; convert the model again, with its tokenizer beside it")
    end = len(tokens)
    while end and _PADDING.fullmatch(tokens[end - 1]):
        end -= 1
    return tokens[:end]


def _types(file: GGUFFile, num_tokens: int) -> list[int]:
    found = file.metadata.get("tokenizer.ggml.token_type") or []
    return [*found, *[_NORMAL] * num_tokens][:num_tokens]


def _byte_level(file: GGUFFile, tokens: Sequence[str]) -> Tokenizer:
    """Byte-pair encoding over bytes, as GPT-2 began it."""
    name = str(file.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in _CUTS and name not in _CUTS_BY_GPT2:
        known = ", ".join(sorted({*_CUTS, *_CUTS_BY_GPT2}))
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre {name!r} is not supported; supported: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata.get("tokenizer.ggml.merges") or ()]
    if not merges:
        raise CheckpointError(f"{file.path} lacks tokenizer.ggml.merges; convert the model again")
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=name in _WITH_WHOLE_WORDS))
    if name in _CUTS:
        cutters = [
            pre_tokenizers.Split(Regex(_CUTS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        cutters = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cutters)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(file: GGUFFile, tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece's byte-pair encoding, which falls back to bytes."""
    is_gemma = str(file.metadata.get("general.architecture")).startswith("gemma")
    if is_gemma:
        # Runs of spaces stand there as such.
        tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
        # Scores are those of another algorithm there: tokens stand in the order in which they were made.
        ranks: Sequence[float] = range(len(tokens))
    else:
        ranks = [-score for score in file.metadata.get("tokenizer.ggml.scores") or ()]
    if len(ranks) < len(tokens):
        raise CheckpointError(f"{file.path} lacks tokenizer.ggml.scores; convert the model again")
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    vocabulary = _vocabulary(tokens)
    types = _types(file, len(tokens))
    made = {token: token_id for token, token_id in vocabulary.items() if types[token_id] not in (_CONTROL, _BYTE)}
    merges = _merges(made, ranks)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    has_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if has_prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return tokenizer


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by text; of several tokens with one text the first, as the others are never made of text."""
    return {token: token_id for token_id, token in reversed(list(enumerate(tokens)))}


def _merges(vocabulary: Mapping[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third one, the pair of the token with the lowest rank first."""
    found = []
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((ranks[token_id], -cut, left, right, token))
    found.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, _, token in found]


def _add_tokens(tokenizer: Tokenizer, file: GGUFFile, tokens: Sequence[str]) -> None:
    """Say which tokens are looked for in a text before it is cut: control tokens, and those that a user has defined."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    types = _types(file, len(tokens))
    for wanted, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        add([
            AddedToken(token, normalized=False, special=wanted == _CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted and token in vocabulary
        ])  # fmt: skip


def _put_around_texts(tokenizer: Tokenizer, file: GGUFFile, named: Mapping[str, str]) -> None:
    """Have the tokens put in front of a text and behind it that belong there."""
    metadata = file.metadata
    is_usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    has_bos = metadata.get("tokenizer.ggml.add_bos_token", is_usual) and "bos_token" in named
    has_eos = metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    bos, eos = ([named[name]] if has else [] for name, has in (("bos_token", has_bos), ("eos_token", has_eos)))
    if not bos and not eos:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *[f"{token}:1" for token in bos], "$B:1", *[f"{token}:1" for token in eos]],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*bos, *eos}],
    )
