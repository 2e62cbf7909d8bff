"""What becomes of texts that are too long where a request allows them to be cut."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.chat.encoder import PromptEncoder

_SPARE_TOKENS = 64
"""Tokens left beyond the cut when a text is shortened before it is tokenized: the last ones may come out otherwise."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens of a text that is too long are kept.

    Attributes:
        most: most tokens of an input, those that the tokenizer puts around a text included; None for as many as the
            model takes.
        keeps_end: keep the last tokens in place of the first.
    """

    most: int | None
    keeps_end: bool = False

    def inputs(self, encoder: PromptEncoder, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """Tokens of texts, or the tokens that were given, none of them too many.

        Raises:
            APIError: a 400.
        """
        most = encoder.most_prompt_tokens if self.most is None else min(self.most, encoder.most_prompt_tokens)
        texts = [self._shortened(encoder, item, most) for item in inputs if isinstance(item, str)]
        encoded = iter(encoder.tokenizer.encode_all(texts))
        front, back = _num_around(encoder) if texts else (0, 0)
        batch = [
            self._cut(next(encoded), most, front, back) if isinstance(item, str) else self._cut(item, most)
            for item in inputs
        ]
        for ids in batch:
            encoder.check_ids(ids, "input")
            encoder.check_length(ids, "input")
        return batch

    def _shortened(self, encoder: PromptEncoder, text: str, most: int) -> str:
        """The part of a huge text that certainly holds the tokens that are kept, so that no more is tokenized."""
        fewest = encoder.tokenizer.min_num_tokens(text)
        if fewest <= most + _SPARE_TOKENS:
            return text
        num_chars = (most + _SPARE_TOKENS) * math.ceil(len(text) / fewest)
        return text[-num_chars:] if self.keeps_end else text[:num_chars]

    def _cut(self, ids: list[int], most: int, front: int = 0, back: int = 0) -> list[int]:
        """The tokens that are kept.

        Args:
            ids: all tokens.
            most: most tokens to keep.
            front, back: how many tokens around the text stay, which a model's vector may be made of.
        """
        if len(ids) <= most:
            return ids
        if front + back >= most:
            return ids[-most:] if self.keeps_end else ids[:most]
        text, room = ids[front : len(ids) - back], most - front - back
        return [*ids[:front], *(text[-room:] if self.keeps_end else text[:room]), *ids[len(ids) - back :]]


def encode_inputs(
    encoder: PromptEncoder, inputs: Sequence[str | list[int]], truncation: Truncation | None
) -> list[list[int]]:
    """Tokens of texts, or the tokens that were given.

    Args:
        truncation: what becomes of inputs that are too long; None if they are errors.

    Raises:
        APIError: a 400.
    """
    return encoder.inputs(inputs) if truncation is None else truncation.inputs(encoder, inputs)


def _num_around(encoder: PromptEncoder) -> tuple[int, int]:
    """How many tokens the tokenizer puts in front of a text, and how many behind it."""
    text, whole = (encoder.tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
    front = next(i for i in range(len(whole) + 1) if whole[i : i + len(text)] == text)
    return front, len(whole) - len(text) - front
