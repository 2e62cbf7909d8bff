"""Names for the content of full pages, so that prompts which begin alike share them."""

import hashlib
from array import array
from collections.abc import Sequence

_ROOT = b"\0" * 16


class PageHashes:
    """Content hashes of one sequence's full pages, grown as the sequence grows.

    A page's hash covers its tokens and the hash of the page before it, so equal hashes mean equal prefixes (128-bit
    BLAKE2b: a collision would show one user's cache to another, so the hash must be cryptographic).
    """

    def __init__(self, page_size: int, salt: bytes = b"") -> None:
        self._page_size = page_size
        self._hashes: list[int] = []
        self._last = hashlib.blake2b(salt, digest_size=16).digest() if salt else _ROOT

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Hash every full page of the first `num_tokens` tokens; return the hashes of all of them, first page first."""
        num_pages = num_tokens // self._page_size
        for page in range(len(self._hashes), num_pages):
            tokens = array("q", token_ids[page * self._page_size : (page + 1) * self._page_size])
            self._last = hashlib.blake2b(self._last + tokens.tobytes(), digest_size=16).digest()
            self._hashes.append(int.from_bytes(self._last, "little"))
        return self._hashes[:num_pages] if num_pages < len(self._hashes) else self._hashes
