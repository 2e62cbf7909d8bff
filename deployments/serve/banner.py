"""The banner that a server shows when it is ready."""

from collections.abc import Mapping

import msgspec

from deployments.channel.messages import EngineInfo

_GIB = 1 << 30


class AnnouncedModel(msgspec.Struct, frozen=True):
    """What a router knows about one model."""

    key: str
    """A name that only this model has."""
    name: str
    """The name that clients use."""
    num_replicas: int
    engine: EngineInfo | None
    """None if there is no engine because the fleet is scaled to zero."""


class Announcement(msgspec.Struct, frozen=True):
    """What a router knows about itself and its models."""

    models: list[AnnouncedModel]
    needs_key: bool


def ready_banner(url: str, told: Announcement, more: Mapping[str, str] | None = None) -> str:
    """A block of lines for people: the address, what answers there, and a request to paste.

    Args:
        url: base address of the server.
        told: what a router announced.
        more: further lines, by their names.
    """
    rows = {"chat": f"{url}/", "fleet": f"{url}/fleet", "API": f"{url}/v1, described at {url}/docs"}
    rows |= _rows_of(told.models[0]) if len(told.models) == 1 else {"models": ", ".join(map(_line_of, told.models))}
    rows |= more or {}
    lines = [f"Rayline is ready: {url}", *(f"  {name:<10}{value}" for name, value in rows.items())]
    key = " -H 'Authorization: Bearer YOUR_KEY'" if told.needs_key else ""
    body = f'{{"model": "{told.models[0].name}", "messages": [{{"role": "user", "content": "What is 17 + 25?"}}]}}'
    lines.append(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'")
    return "\n".join(lines)


def _rows_of(model: AnnouncedModel) -> dict[str, str]:
    """All that is known of the only model."""
    rows, engine = {"model": model.name}, model.engine
    if engine is None:
        return rows | {"replicas": "none yet: the first request starts one"}
    replicas = f" in each of {model.num_replicas} replicas" if model.num_replicas > 1 else ""
    each = f" and {engine.num_gpus - 1} more a replica" if engine.num_gpus > 1 else ""
    rows["device"] = f"{engine.device}{each}, {engine.dtype}"
    rows["context"] = f"{engine.max_seq_len:,} tokens"
    rows["slots"] = f"{engine.num_slots:,} tokens{replicas}"
    if engine.weight_bytes:
        weights, kv_cache = _size(engine.weight_bytes), _size(engine.kv_cache_bytes)
        where = replicas if engine.num_gpus == 1 else " on each of their devices"
        rows["memory"] = f"{weights} of weights, {kv_cache} of keys and values{where}"
    return rows


def _line_of(model: AnnouncedModel) -> str:
    """One of several models in a few words."""
    if model.engine is None:
        return f"{model.key} (asleep)"
    replicas = f"{model.num_replicas} replicas" if model.num_replicas > 1 else "1 replica"
    return f"{model.key} ({replicas}, {model.engine.max_seq_len:,} tokens of context)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / (1 << 20):.0f} MiB"
