"""Makes a real engine lose its device on demand; only for the chaos suite."""

import os
from pathlib import Path
from typing import Any

import torch

from llm.serving.engine import ContinuousBatchingEngine


def lose_device_on_demand(engine: ContinuousBatchingEngine, fault_dir: str) -> None:
    """Have every step index past the end of a tensor while the directory holds a file named after this process's id.

    On a GPU that is a device-side assert, after which every CUDA call of the process fails. On a CPU the step fails.
    """
    file, launch = Path(fault_dir) / str(os.getpid()), engine.runner.launch

    def launch_or_fail(*args: Any) -> Any:
        if file.exists():
            device = engine.model.device
            torch.zeros(1, device=device)[torch.ones(1, dtype=torch.long, device=device)]
        return launch(*args)

    engine.runner.launch = launch_or_fail  # type: ignore[method-assign, assignment]
