"""What happened in the fleet lately, for people to read."""

import time
from collections import deque
from typing import Any

_KEPT = 30
_SAME_S = 5.0


class News:
    """The last few events, newest first."""

    def __init__(self) -> None:
        self._items: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def add(self, text: str, *, is_bad: bool = False) -> None:
        """Something happened now."""
        self._items.appendleft({"at": time.time(), "text": text, "is_bad": is_bad})

    def count(self, once: str, often: str) -> None:
        """Something happened that may happen many times in a few seconds: one item with their number.

        Args:
            once: text for the first time.
            often: text for more, with `{}` for the number.
        """
        now = time.time()
        for item in self._items:
            if item.get("often") == often and now - item["at"] < _SAME_S:
                item["num"] += 1
                item["text"] = often.format(item["num"])
                return
        self._items.appendleft({"at": now, "text": once, "is_bad": False, "often": often, "num": 1})

    def items(self) -> list[dict[str, Any]]:
        """When (Unix time), what, and whether it is bad."""
        return [{name: item[name] for name in ("at", "text", "is_bad")} for item in self._items]
