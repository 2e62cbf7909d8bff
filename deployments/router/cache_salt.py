"""Requests share cached prompts if their salts are equal."""

import hashlib

from llm.serving.schemas import AdapterRef, GenerationRequest


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


def as_sent(request: GenerationRequest, tenant: str, adapter: AdapterRef | None) -> GenerationRequest:
    """The request as engines get it: with its adapter, and with a salt that also separates tenants. The same object if
    it has neither."""
    salt = salt_of(tenant, request.cache_salt)
    if salt == request.cache_salt and adapter is None:
        return request
    return request.model_copy(update={"cache_salt": salt, "adapter": adapter})
