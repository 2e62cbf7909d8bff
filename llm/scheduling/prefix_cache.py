"""Names for the content of full pages, so that prompts that begin with the same tokens share them."""

import hashlib
from array import array
from collections.abc import Sequence

_ROOT = b"\0" * 16


class PageHashes:
    """Content hashes of one sequence's full pages, grown as the sequence grows.

    A page's hash covers its tokens and the hash of the page before it, so equal hashes mean equal prefixes (128-bit
    BLAKE2b: a collision would show one user's cache to another, so the hash must be cryptographic).

    Args:
        page_size: tokens in a page.
        salt: sequences share pages only with those that have the same salt.

    Attributes:
        known: hashes of the pages hashed so far, first page first. Callers read it and never change it.
    """

    def __init__(self, page_size: int, salt: bytes = b"") -> None:
        self.known: list[int] = []
        self._page_size = page_size
        self._last = hashlib.blake2b(salt, digest_size=16).digest() if salt else _ROOT

    def extend(self, token_ids: Sequence[int], num_tokens: int, max_new_pages: int | None = None) -> list[int]:
        """Hash the full pages of the first `num_tokens` tokens; return the hashes of these pages, first page first.

        Args:
            token_ids: the sequence's tokens, at least `num_tokens`.
            num_tokens: how far to hash.
            max_new_pages: most pages without a hash to hash now, so that a long prompt can be hashed in portions; pages
                after them are left out of the result. None for all.
        """
        num_pages = num_tokens // self._page_size
        first = len(self.known)
        end = num_pages if max_new_pages is None else min(num_pages, first + max_new_pages)
        if first < end:
            content = array("q", token_ids[first * self._page_size : end * self._page_size]).tobytes()
            page_bytes = 8 * self._page_size
            last, blake2b, known = self._last, hashlib.blake2b, self.known
            for start in range(0, len(content), page_bytes):
                last = blake2b(last + content[start : start + page_bytes], digest_size=16).digest()
                known.append(int.from_bytes(last, "little"))
            self._last = last
        return self.known[:num_pages] if num_pages < len(self.known) else self.known
