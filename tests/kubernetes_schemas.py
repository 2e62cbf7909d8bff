"""Which objects a Kubernetes cluster takes: the published schemas of Kubernetes and of the operators that we use.

Kubernetes' own schemas come with `kubernetes-validate`, those of the Prometheus operator as models with
`cloudcoil-models-prometheus-operator`. No package has KubeRay's; its objects consist of
pods, services and the few fields below.
"""

from functools import cache
from typing import Any, Literal

from kubernetes_validate import validate
from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

KUBERNETES_VERSION = "1.31"
"""The oldest one that the manifests have to suit."""

Object = dict[str, Any]


@cache
def prometheus_operator() -> dict[str, type[BaseModel]]:
    """The operator's objects by kind; imported when one is checked, since there are so many that it takes seconds."""
    from cloudcoil.models.prometheus_operator import v1, v1alpha1

    return {
        "PodMonitor": v1.PodMonitor,
        "PrometheusRule": v1.PrometheusRule,
        "ScrapeConfig": v1alpha1.ScrapeConfig,
    }


class Strict(BaseModel):
    """An object of KubeRay's API ray.io/v1, whose fields are listed in docs/reference/api.md of KubeRay 1.5."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idle_timeout_seconds: int | None = None
    resources: Object | None = None
    security_context: Object | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    env: list[Object] | None = None
    env_from: list[Object] | None = None
    volume_mounts: list[Object] | None = None


class RedisCredential(Strict):
    value: str | None = None
    value_from: Object | None = None


class GcsFaultToleranceOptions(Strict):
    redis_address: str
    redis_username: RedisCredential | None = None
    redis_password: RedisCredential | None = None
    external_storage_namespace: str | None = None


class HeadGroupSpec(Strict):
    ray_start_params: dict[str, str]
    template: Object
    head_service: Object | None = None
    enable_ingress: bool | None = None
    service_type: str | None = None


class WorkerGroupSpec(Strict):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    num_of_hosts: int | None = None
    idle_timeout_seconds: int | None = None
    suspend: bool | None = None
    ray_start_params: dict[str, str]
    template: Object


class RayClusterSpec(Strict):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool | None = None
    autoscaler_options: AutoscalerOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_service_annotations: dict[str, str] | None = None
    suspend: bool | None = None
    head_group_spec: HeadGroupSpec
    worker_group_specs: list[WorkerGroupSpec]


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(Strict):
    """Without the two thresholds for unhealthy services, which are deprecated and not read."""

    serve_config_v2: str
    ray_cluster_config: RayClusterSpec
    upgrade_strategy: UpgradeStrategy | None = None
    serve_service: Object | None = None
    exclude_head_pod_from_serve_svc: bool | None = None


class RayService(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Object
    spec: RayServiceSpec


def check(document: Object) -> None:
    """Refuse an object that the API server would refuse or of which it would drop a field.

    Raises:
        ValueError: a field of one of the operators' objects is unknown, missing or of another type.
        jsonschema.ValidationError: the same for Kubernetes' own objects and the pods of a RayService.
    """
    if document["kind"] == "RayService":
        cluster = RayService.model_validate(document).spec.ray_cluster_config
        for group in (cluster.head_group_spec, *cluster.worker_group_specs):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group.template}
            validate(template, KUBERNETES_VERSION, strict=True)
    elif document["kind"] in prometheus_operator():
        model = prometheus_operator()[document["kind"]].model_validate(document)
        # The models take unknown fields and drop them, as the API server does.
        kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if kept != document:
            raise ValueError(f"{document['kind']} {document['metadata']['name']}: of this {kept} is left")
    else:
        validate(document, KUBERNETES_VERSION, strict=True)
