"""Requests share cached prompts if their salts are equal."""

import hashlib


def salt_of(tenant: str, salt: str) -> str:
    """The salt of an API key's requests that bring `salt`; different for each pair of tenant and salt.

    Args:
        tenant: whose cache it is; "" for the shared one.
        salt: the request's own salt; "" for none.

    Returns:
        "" for the shared cache without a salt; otherwise a SHA-256 over both, preceded by the length of the first so
        that no two pairs are confused.
    """
    if not tenant and not salt:
        return ""
    first, second = tenant.encode(), salt.encode()
    return hashlib.sha256(len(first).to_bytes(8, "big") + first + second).hexdigest()
