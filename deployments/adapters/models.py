"""What the catalog of adapters needs to know of an application's configuration."""

from deployments.adapters.catalog import CatalogModel
from deployments.adapters.directory import AdapterRules
from deployments.config import AppConfig
from deployments.model_config import EngineKind, ServedModelConfig


def catalog_models(config: AppConfig) -> list[CatalogModel]:
    """The entries of `models` that may have adapters."""
    return [
        CatalogModel(
            key,
            entry.model_name,
            tuple((adapter.name, adapter.path) for adapter in entry.adapters),
            entry.adapter_folder,
            entry.adapter_roots,
            entry.max_known_adapters,
            adapter_rules(entry),
        )
        for key, entry in config.by_key.items()
        if entry.may_have_adapters
    ]


def names_of_models(config: AppConfig) -> list[str]:
    """Every name that stands for a model."""
    return sorted({name for entry in config.entries for name in entry.names})


def adapter_rules(entry: ServedModelConfig) -> AdapterRules:
    """What an adapter for this model must be like. An emulated engine takes those of any model."""
    return AdapterRules(
        max_rank=entry.engine.max_adapter_rank,
        max_bytes=int(entry.engine.adapter_host_gib * (1 << 30)),
        model=entry.model if entry.engine_kind is EngineKind.TORCH else None,
        with_experts=entry.engine.adapter_experts,
    )
