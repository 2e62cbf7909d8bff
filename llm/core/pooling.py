"""How the vector of a text is made of its final hidden states."""

from enum import StrEnum


class Pooling(StrEnum):
    """Which of a prompt's final hidden states make its vector, and how."""

    LAST = "last"
    """The last token's."""
    MEAN = "mean"
    """The average over all tokens."""
    LABELS = "labels"
    """Logits of a classifier's labels, computed from the last token's; the vector is not normalized."""
