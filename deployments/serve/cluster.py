"""Facts about the Ray cluster around this process, and what follows for the replicas."""

import logging
import os
from pathlib import Path

import ray

from deployments.model_config import EngineKind, ServedModelConfig

logger = logging.getLogger("ray.serve")

_AUTOSCALED_BY = ("KUBERAY_GEN_RAY_START_CMD", "RAY_CLUSTER_NAME", "RAY_NODE_TYPE_NAME")
"""Variables that KubeRay sets in every pod, and Ray's autoscaler on the nodes that it starts."""
_LAUNCHER_CONFIG = "ray_bootstrap_config.yaml"
"""Where Ray's cluster launcher leaves its configuration, in the home directory of the head node."""


def gpus_now() -> float:
    """Number of GPUs of the nodes that are in the cluster now."""
    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0


def may_nodes_join() -> bool:
    """Whether something adds nodes to this cluster automatically: KubeRay, or Ray's autoscaler on machines.

    Ray has no public call that tells which nodes could join.
    """
    return any(os.environ.get(name) for name in _AUTOSCALED_BY) or (Path.home() / _LAUNCHER_CONFIG).exists()


def gpus_a_replica(config: ServedModelConfig, num_gpus: float, may_join: bool) -> float:
    """Number of GPUs for Ray to set aside for each replica, which waits until one node has that many free.

    They are the replica's own request, and not bundles of a placement group: Ray gives an actor all its GPUs on one
    node, and the processes that the replica starts see those that it sees.

    Args:
        config: the settings of the model; `replicas.num_gpus` decides where it is set.
        num_gpus: GPUs of the cluster at this moment; an autoscaled one may have none just now.
        may_join: whether nodes join by themselves.
    """
    if config.replicas.num_gpus is not None:
        return config.replicas.num_gpus
    own = config.engine.tensor_parallel_size
    wants_cuda = config.device is not None and config.device.startswith("cuda")
    if config.engine_kind is not EngineKind.TORCH or not (wants_cuda or config.device is None):
        return 0
    if num_gpus >= 1:
        return own
    if wants_cuda or may_join:
        logger.warning(
            "no node of the cluster has a GPU now: replicas wait for one. replicas.num_gpus: 0 runs them on CPUs"
        )
        return own
    logger.warning(
        "no node of the cluster has a GPU: replicas run on CPUs. "
        f"replicas.num_gpus: {own} waits for a node that has {'one' if own == 1 else 'as many'}"
    )
    return 0
