"""Names of the deployments with engine replicas."""

import re
from zlib import crc32

from deployments.config import AppConfig

ENGINE_DEPLOYMENT = "EngineReplica"
"""Name of the deployment of an application with a single model, and the beginning of the names of all others."""


def engine_names(config: AppConfig) -> dict[str, str]:
    """The name of each model's deployment, by the keys of `AppConfig.by_key`.

    It depends on nothing but the key, so that a model keeps its replicas when other models come and go.
    """
    if not config.models:
        return dict.fromkeys(config.by_key, ENGINE_DEPLOYMENT)
    return {key: f"{ENGINE_DEPLOYMENT}-{_slug(key)}" for key in config.by_key}


def _slug(key: str) -> str:
    """The key with the characters that deployments' names may have; one that had others gets a checksum."""
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", key)
    return slug if slug == key else f"{slug}-{crc32(key.encode()):08x}"
