"""The application: the only place that binds deployments."""

from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig as ServeAutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deployments.adapters.models import catalog_models, names_of_models
from deployments.config import AppConfig, resolve_paths, without_secrets
from deployments.fingerprint import fingerprint_of
from deployments.fleet.autoscaling import EnginePolicy
from deployments.fleet.engine_use import targets_of
from deployments.model_config import AutoscalingConfig, ReplicasConfig, ServedModelConfig, for_engines, restart_key
from deployments.router.keys import KeySource, find_keys
from deployments.serve.accountant import AccountantReplica
from deployments.serve.adapter_catalog import AdapterCatalogReplica
from deployments.serve.cluster import gpus_a_replica, gpus_now, may_nodes_join
from deployments.serve.config_file import check_model
from deployments.serve.engine_deployment import ServeEngineReplica
from deployments.serve.engine_names import engine_names
from deployments.serve.front_end import check_open, find_front_end
from deployments.serve.ingress import RouterIngress
from deployments.serve.own_version import with_own_version
from deployments.serve.request_router import RankedRequestRouter
from deployments.serve.response_store import ResponseStoreReplica
from deployments.usage.ledger import open_record
from deployments.usage.place import RecordPlace, find_place
from llm.checkpoint.hub import find_local_checkpoint

_HEALTH_CHECK_PERIOD_S = 1
_HEALTH_CHECK_TIMEOUT_S = 8
"""Serve gives up on a replica after three failures: 24 s."""
_METRICS_INTERVAL_S, _LOOK_BACK_S = 0.5, 1.0
_SMALLEST_AMOUNT = 0.0001
"""Smallest amount of a resource that Ray counts."""
_RUNTIME_ENV = {"env_vars": {"MALLOC_ARENA_MAX": "2"}}
"""Environment of every replica, set before its process starts. Otherwise glibc spreads the process's 40 threads over 8
arenas per core, and free memory collects in each: a router holds about 20 MB more for the same amount in use."""


def build_app(args: AppConfig) -> Application:
    """Bind a router in front of engine replicas, as `args` describes them.

    Raises:
        CheckpointError, ConfigError: the checkpoint or the configuration cannot be used; one line with the fix.
    """
    keys = find_keys(args)
    place = find_place(args.accounts)
    open_record(place.record).close()  # so that what is missing is said now
    front_end = find_front_end()
    check_open(args, bool(keys.keys), front_end)
    config = without_secrets(resolve_paths(args))
    for entry in config.entries:
        check_model(entry)
    if config.public_url is None and front_end is not None:
        config = config.model_copy(update={"public_url": front_end.url})
    if config.allow_admin_without_keys is None:
        config = config.model_copy(update={"allow_admin_without_keys": front_end is not None and front_end.is_local})
    names, entries = engine_names(config), config.by_key
    engines = {key: _engines(names[key], entry) for key, entry in entries.items()}
    num_routers = config.router.num_replicas
    accountant = (
        with_own_version(_accountant_deployment(config).bind(num_routers, place), str(num_routers), place.record or "")
        if _needs_accountant(config, keys, place)
        else None
    )
    store = (
        with_own_version(_store_deployment(config).bind(config.responses), config.responses.model_dump_json())
        if _needs_store(config)
        else None
    )
    models, taken = catalog_models(config), names_of_models(config)
    catalog = (
        with_own_version(_catalog_deployment(config).bind(models, taken), repr((models, taken))) if models else None
    )
    return _router_deployment(config).bind(config, keys, engines, accountant, store, place, catalog)


def _needs_accountant(config: AppConfig, keys: KeySource, place: RecordPlace) -> bool:
    """Whether several routers count together what keys use."""
    return config.router.num_replicas > 1 and (bool(keys.keys) or place.record is not None)


def _needs_store(config: AppConfig) -> bool:
    """Whether several routers share stored responses; a single router keeps them itself."""
    return config.router.num_replicas > 1 and config.responses.max_responses > 0


def _accountant_deployment(config: AppConfig) -> Any:
    return _shared_deployment(config, AccountantReplica, "Accountant")


def _store_deployment(config: AppConfig) -> Any:
    return _shared_deployment(config, ResponseStoreReplica, "ResponseStore")


def _catalog_deployment(config: AppConfig) -> Any:
    return _shared_deployment(config, AdapterCatalogReplica, "AdapterCatalog")


def _shared_deployment(config: AppConfig, deployed: type, name: str) -> Any:
    """A deployment with one replica, which all routers call."""
    # It runs where routers run, not on a node that is scaled down once no replica needs it, and takes almost nothing of
    # the resources that the routers take there.
    resources = {kind: min(amount, _SMALLEST_AMOUNT) for kind, amount in config.router.resources.items()}
    return serve.deployment(deployed).options(
        name=name,
        num_replicas=1,
        ray_actor_options={"num_gpus": 0, "num_cpus": 0, "resources": resources, "runtime_env": _RUNTIME_ENV},
        max_ongoing_requests=1024,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=_HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=1,
    )


def _engines(name: str, config: ServedModelConfig) -> Application:
    """The engine replicas of one model. What they get is the model's own settings alone, so that a change of another
    model's is none of theirs."""
    num_gpus = gpus_a_replica(config, gpus_now(), may_nodes_join())
    if not num_gpus and config.device is None:
        # A replica without a GPU of its own still sees those of its node.
        config = config.model_copy(update={"device": "cpu"})
    # Where the files in the model's directory have changed, the routers' new version needs new replicas.
    files = fingerprint_of(config) if find_local_checkpoint(config.model) is not None else ""
    bound = _engine_deployment(name, config.replicas, num_gpus).bind(for_engines(config))
    return with_own_version(bound, restart_key(config), files)


def _engine_deployment(name: str, replicas: ReplicasConfig, num_gpus: float) -> Any:
    scale: dict[str, Any] = {"num_replicas": replicas.num_replicas}
    if replicas.autoscaling is not None:
        scale = {"autoscaling_config": _serve_autoscaling(replicas.autoscaling)}
    return serve.deployment(ServeEngineReplica).options(
        name=name,
        ray_actor_options={"num_gpus": num_gpus, "num_cpus": replicas.num_cpus, "runtime_env": _RUNTIME_ENV},
        request_router_config=RequestRouterConfig(request_router_class=RankedRequestRouter),
        max_ongoing_requests=replicas.max_ongoing_requests,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=_HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=replicas.graceful_shutdown_timeout_s,
        max_surge_percent=replicas.max_surge_percent,
        **scale,
    )


def _serve_autoscaling(autoscaling: AutoscalingConfig) -> ServeAutoscalingConfig:
    """Serve's autoscaling configuration, with our policy and a pace that follows the load within seconds."""
    return ServeAutoscalingConfig(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas,
        initial_replicas=autoscaling.initial_replicas,
        upscale_delay_s=autoscaling.upscale_delay_s,
        downscale_delay_s=autoscaling.downscale_delay_s,
        downscale_to_zero_delay_s=autoscaling.downscale_to_zero_delay_s,
        metrics_interval_s=_METRICS_INTERVAL_S,
        look_back_period_s=_LOOK_BACK_S,
        policy=AutoscalingPolicy(policy_function=EnginePolicy, policy_kwargs=asdict(targets_of(autoscaling))),
    )


def _router_deployment(config: AppConfig) -> Any:
    router = config.router
    # Without an argument, `ingress` asks the instance itself for its HTTP application.
    return serve.deployment(serve.ingress()(RouterIngress)).options(
        name="Router",
        num_replicas=router.num_replicas,
        ray_actor_options={
            "num_gpus": 0,
            "num_cpus": router.num_cpus,
            "resources": router.resources,
            "runtime_env": _RUNTIME_ENV,
        },
        # More than the router accepts, so that excess requests get an answer instead of waiting in Serve.
        max_ongoing_requests=2 * router.max_ongoing_requests,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=_HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=router.graceful_shutdown_timeout_s,
        max_surge_percent=router.max_surge_percent,
    )


def __getattr__(name: str) -> Application:
    """`app` for `serve build`, with every setting at its default; built on first access."""
    if name == "app":
        return build_app(AppConfig())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
