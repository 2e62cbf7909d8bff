"""Checks that a machine has what replicas need."""

from collections.abc import Collection, Mapping

from deployments.config import AppConfig
from deployments.model_config import EngineKind, ServedModelConfig
from deployments.serve.cluster import gpus_a_replica
from llm.errors import ConfigError


def check_resources(apps: Collection[AppConfig], resources: Mapping[str, float]) -> None:
    """Check that the machine has what all replicas need to start; otherwise they would wait for it forever.

    Raises:
        ConfigError: it does not.
    """
    num_gpus, num_cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    gpus = cpus = 0.0
    for config in apps:
        cpus += config.router.num_replicas * config.router.num_cpus
    entries = [entry for config in apps for entry in config.entries]
    for entry in entries:
        replicas = entry.replicas
        count = replicas.num_replicas
        if replicas.autoscaling is not None:
            count = replicas.autoscaling.initial_replicas or replicas.autoscaling.min_replicas
        gpus += count * gpus_a_replica(entry, num_gpus, may_join=False)
        cpus += count * replicas.num_cpus
    if gpus > num_gpus:
        has_several = any(entry.engine.tensor_parallel_size > 1 for entry in entries)
        fix = "fewer --replicas" + (", or a smaller --tp" if has_several else "")
        raise ConfigError(f"the replicas need {gpus:g} GPUs and this machine has {num_gpus:g}: set {fix}")
    if cpus > num_cpus:
        raise ConfigError(
            f"replicas and routers reserve {cpus:g} CPUs and this machine has {num_cpus:g}: set fewer --replicas, or "
            "a smaller replicas.num_cpus"
        )


def check_device(config: ServedModelConfig) -> None:
    """Check that PyTorch has the device that the configuration names.

    Raises:
        ConfigError: it is a GPU, and there is none.
    """
    if config.engine_kind is EngineKind.TORCH and config.device is not None and config.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"device: {config.device} needs a GPU, and PyTorch sees none here: see rayline doctor")
