"""Token ids to text, one at a time: each token is some bytes, and UTF-8 says where a character is complete.

The tokenizer families of Llama, Mistral and Qwen all decode this way: byte-level BPE writes each byte as a printable
character, SentencePiece writes a space as "▁" and rare bytes as "<0xE4>". Other kinds go through `WindowDecoder`.
"""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEW_UTF8_DECODER = codecs.getincrementaldecoder("utf-8")


class TokenBytes(dict[int, bytes]):
    """Bytes of each token, worked out on first use; nothing for special tokens and ids outside the vocabulary.

    Raises:
        ValueError: this tokenizer's decoder does not work token by token.
    """

    def __init__(self, tokenizer: RustTokenizer, special_ids: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        self._is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in kinds
        if not (self._is_byte_level or (kinds and all(map(_is_sentencepiece_step, steps)))):
            raise ValueError(f"decoder {kinds} does not work token by token")
        # Encoding put a space in front of the text: Strip takes it off again, Metaspace all of the first token's.
        self.strips_one_space = "Strip" in kinds
        self.strips_first_token = any(step.get("prepend_scheme", "never") != "never" for step in steps)

    def __missing__(self, token_id: int) -> bytes:
        piece = b"" if token_id in self._special_ids else self.raw(token_id)
        self[token_id] = piece
        return piece

    def raw(self, token_id: int) -> bytes:
        """Bytes of a token, those of a special token's name included."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def first(self, token_id: int) -> bytes:
        """Bytes of a token that begins the text."""
        piece = self[token_id]
        if self.strips_first_token and "▁" in (self._tokenizer.id_to_token(token_id) or ""):
            return piece.replace(b" ", b"")
        return piece.removeprefix(b" ") if self.strips_one_space else piece


class ByteDecoder:
    """Decodes one sequence by its tokens' bytes. Bytes that are not UTF-8 become U+FFFD as soon as that is certain.

    Args:
        token_bytes: of each token.
        shown_ids: special tokens that are not left out.
    """

    __slots__ = ("_at_start", "_decode", "_shown_ids", "_token_bytes")

    def __init__(self, token_bytes: TokenBytes, shown_ids: frozenset[int] = frozenset()) -> None:
        self._token_bytes = token_bytes
        self._shown_ids = shown_ids
        self._decode = _NEW_UTF8_DECODER(errors="replace").decode
        self._at_start = token_bytes.strips_one_space or token_bytes.strips_first_token

    def step(self, token_id: int) -> str:
        """Take the next token; return the characters it completes."""
        if token_id in self._shown_ids:
            return self._decode(self._token_bytes.raw(token_id))
        piece = self._token_bytes[token_id]
        if self._at_start and piece:
            self._at_start = False
            piece = self._token_bytes.first(token_id)
        return self._decode(piece)

    def finish(self) -> str:
        """U+FFFD for the start of a character that never became complete, else nothing."""
        return self._decode(b"", True)


class WindowDecoder:
    """Decodes one sequence by asking the library for the text of the last tokens, with the ones before as context.

    Args:
        tokenizer: the library's.
        shown_ids: special tokens that are not left out.
    """

    def __init__(self, tokenizer: RustTokenizer, shown_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._shown = shown_ids
        self._shown_ids: list[int] = []
        self._new_ids: list[int] = []

    def step(self, token_id: int) -> str:
        """Take the next token; return the characters it completes."""
        if token_id in self._shown:
            text = self._pending() + (self._tokenizer.id_to_token(token_id) or "")
            self._shown_ids, self._new_ids = [], []
            return text
        self._new_ids.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown_ids, self._new_ids = self._new_ids, []
        return text

    def finish(self) -> str:
        """Whatever is still incomplete, as the library shows it."""
        return self._pending()

    def _pending(self) -> str:
        context = self._tokenizer.decode(self._shown_ids)
        text: str = self._tokenizer.decode([*self._shown_ids, *self._new_ids])
        return text[len(context) :]


def decode_all(decoder: ByteDecoder | WindowDecoder, token_ids: Sequence[int]) -> str:
    """Text of a whole sequence with a fresh decoder; an incomplete character at the end becomes U+FFFD."""
    parts = [decoder.step(token_id) for token_id in token_ids]
    return "".join(parts) + decoder.finish()


def _decoder_steps(tokenizer: RustTokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _is_sentencepiece_step(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "Replace":
            return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")
        case "Strip":
            return bool(step["content"] == " " and step["start"] == 1 and step["stop"] == 0)
        case "Metaspace":
            return bool(step["replacement"] == "▁")
        case kind:
            return kind in ("ByteFallback", "Fuse")


def _byte_characters() -> dict[str, int]:
    """Byte of each character that byte-level BPE writes: printable ones stand for themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}


_BYTE_OF_CHARACTER = _byte_characters()
