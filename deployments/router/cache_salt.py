"""Which requests share cached prompts: those with equal salts."""

import hashlib


def salt_of(tenant: str, salt: str) -> str:
    """The salt of an API key's requests that bring `salt`; different for each pair of the two.

    Args:
        tenant: whose cache it is; "" for everybody's.
        salt: of the request; "" for none.

    Returns:
        "" for everybody's cache without a salt, else a SHA-256 over both in a form that tells them apart: the length
        of the first stands in front.
    """
    if not tenant and not salt:
        return ""
    first, second = tenant.encode(), salt.encode()
    return hashlib.sha256(len(first).to_bytes(8, "big") + first + second).hexdigest()
