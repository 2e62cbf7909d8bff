"""Which special tokens a tokenizer puts around a text, and around and between the two texts of a pair."""

from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The special tokens of a tokenizer's post-processor.

    Attributes:
        prefix, suffix: in front of a text and behind it.
        of_pair: in front of the first text of a pair, between the texts, and behind the second; None if its
            post-processor does more with a pair than this.
    """

    prefix: Ids
    suffix: Ids
    of_pair: tuple[Ids, Ids, Ids] | None

    @classmethod
    def of(cls, tokenizer: RustTokenizer, prefix: Ids, suffix: Ids) -> "Surroundings":
        """Find them by trying the post-processor on a sample.

        Args:
            prefix, suffix: what counts if there is no post-processor.

        Raises:
            ValueError: it does something else with a text than to put tokens around it.
        """
        if tokenizer.post_processor is None:
            return cls(prefix, suffix, (prefix, (*suffix, *prefix), suffix))
        for sample in ("a", *tokenizer.get_vocab()):
            bare, whole = (tokenizer.encode(sample, add_special_tokens=special) for special in (False, True))
            if bare.ids:
                break
        found = _around(whole.special_tokens_mask, whole.ids, [len(bare.ids)])
        if found is None:
            raise ValueError("its post-processor does more than to put tokens around a text, which is not supported")
        pair = tokenizer.encode(sample, sample, add_special_tokens=True)
        of_pair = _around(pair.special_tokens_mask, pair.ids, [len(bare.ids)] * 2)
        return cls(found[0], found[1], None if of_pair is None else (of_pair[0], of_pair[1], of_pair[2]))


def _around(is_special: list[int], ids: list[int], lens: list[int]) -> list[Ids] | None:
    """The special tokens around texts of these lengths, in order; None if something else stands there.

    Args:
        is_special: 1 for each token that the post-processor put there, 0 for each of a text.
    """
    parts: list[Ids] = []
    at = 0
    for length in [*lens, 0]:  # behind the last text there is none
        start = at
        while at < len(ids) and is_special[at]:
            at += 1
        parts.append(tuple(ids[start:at]))
        if is_special[at : at + length] != [0] * length:
            return None
        at += length
    return parts if at == len(ids) else None
