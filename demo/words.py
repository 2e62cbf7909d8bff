"""Words for the letter tasks: common English ones, and invented ones so that the model learns letters, not a list."""

from pathlib import Path
from random import Random

COMMON_WORDS = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())

_ONSETS = (*"bcdfghjklmnprstvwyz", "bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "kl", "pl", "pr", "qu")
_ONSETS += ("sh", "sk", "sl", "sp", "st", "str", "th", "tr")
_VOWELS = (*"aaeeiioouy", "ai", "ea", "ee", "oo", "ou")
_CODAS = ("", "", "", *"bdglmnprstx", "ck", "ll", "nd", "ng", "nt", "rd", "ss", "st", "tt")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_word(rng: Random) -> str:
    """Return a lower-case word of 2 to 14 letters: common, made of syllables, or letters at random."""
    kind = rng.random()
    if kind < 0.3:
        return COMMON_WORDS[int(rng.random() * len(COMMON_WORDS))]
    if kind < 0.7:
        return invented_word(rng)
    return random_letters(rng)


def invented_word(rng: Random) -> str:
    """Return a word of one to four syllables that could be pronounced, such as "blentoria"."""
    word = ""
    for _ in range(1 + int(rng.random() * 4)):
        word += _ONSETS[int(rng.random() * len(_ONSETS))]
        word += _VOWELS[int(rng.random() * len(_VOWELS))]
        word += _CODAS[int(rng.random() * len(_CODAS))]
    return word[:14] if len(word) > 1 else word + "n"


def random_letters(rng: Random) -> str:
    """Return 2 to 14 letters, often from a small alphabet so that letters repeat."""
    alphabet = _LETTERS if rng.random() < 0.6 else "".join(rng.sample(_LETTERS, 5))
    return "".join([alphabet[int(rng.random() * len(alphabet))] for _ in range(2 + int(rng.random() * 13))])
