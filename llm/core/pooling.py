"""How the vector of a text is made."""

from enum import StrEnum


class Pooling(StrEnum):
    """Which of a prompt's final hidden states make its vector."""

    LAST = "last"
    """The last token's."""
    MEAN = "mean"
    """The average over all tokens."""
