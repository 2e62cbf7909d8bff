"""Says what is doubtful about models that share GPUs, before anything starts."""

import math
from collections.abc import Mapping

from deployments.model_config import EngineKind, ServedModelConfig


def sharing_notes(models: Mapping[str, ServedModelConfig]) -> list[str]:
    """What an operator should know about models that share GPUs, one line each.

    Args:
        models: the settings of each model, by a name for it.
    """
    on_gpus = {name: model for name, model in models.items() if model.engine_kind is EngineKind.TORCH}
    shared = {name: model for name, model in on_gpus.items() if 0 < (model.replicas.num_gpus or 0) < 1}
    notes = [note for name, model in on_gpus.items() for note in _own_notes(name, model)]
    parts = {name: model.replicas.most_replicas * (model.replicas.num_gpus or 0) for name, model in shared.items()}
    total = sum(parts.values())
    if total > 1:
        listed = " + ".join(f"{name} {part:g}" for name, part in parts.items())
        notes.append(
            f"the models that share GPUs take {total:g} of them ({listed}): on one GPU not all of their replicas "
            f"start; they need {math.ceil(total)}, or smaller replicas.num_gpus"
        )
    return notes


def _own_notes(name: str, model: ServedModelConfig) -> list[str]:
    """What is doubtful about one model."""
    set_aside = model.replicas.num_gpus
    wants_gpu = model.device is not None and model.device.startswith("cuda")
    if set_aside == 0 and wants_gpu and model.engine.gpu_share is None:
        return [
            f"{name}: replicas.num_gpus: 0 sets no GPU aside, and each replica fills "
            f"{model.engine.gpu_memory_utilization:g} of one: where others use it too, set num_gpus to its part, "
            "such as 0.5"
        ]
    if set_aside is None or not 0 < set_aside < 1:
        return []
    notes = []
    if model.gpu_share > set_aside:
        notes.append(
            f"{name}: engine.gpu_share: {model.gpu_share:g} is above replicas.num_gpus: {set_aside:g}: the replicas "
            f"that Ray puts on one GPU may want {model.gpu_share * int(1 / set_aside + 1e-6):g} times its memory"
        )
    if model.engine.num_pages is not None:
        notes.append(
            f"{name}: engine.num_pages: {model.engine.num_pages} sizes the pool whatever share of a GPU a replica has; "
            "leave it out to fill the share"
        )
    return notes
