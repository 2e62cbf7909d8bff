"""What a replica tells of its GPUs, against torch's own figures and while a kernel keeps one busy."""

import time

import pytest
import torch

from deployments.replica.machine import MachineWatch
from deployments.replica.nvml import find_nvml

pytestmark = pytest.mark.gpu


def test_memory_and_use_are_those_of_the_gpu():
    ballast = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    watch = MachineWatch([0], num_cores=1)
    matrix, ends_at = torch.randn(8192, 8192, device="cuda"), time.monotonic() + 4
    while time.monotonic() < ends_at:
        matrix @ matrix
        torch.cuda.synchronize()
    (gpu,) = watch.latest.gpus
    watch.close()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    assert gpu.name == torch.cuda.get_device_name()
    # NVML counts what the driver keeps for itself, which the runtime leaves out of both.
    assert gpu.total_bytes == pytest.approx(total_bytes, rel=0.02)
    assert gpu.used_bytes == pytest.approx(total_bytes - free_bytes, abs=2 << 30)
    assert gpu.used_bytes >= ballast.nbytes
    assert gpu.busy_percent is not None
    assert gpu.busy_percent > 50


def test_looking_is_cheap_and_leaves_graphs_alone():
    """Another thread asks the driver while a graph is captured: the capture must not notice."""
    watch = MachineWatch([0], num_cores=1)
    started = time.monotonic()
    for _ in range(20):
        watch._look()
    assert (time.monotonic() - started) / 20 < 0.05
    x = torch.zeros(16, device="cuda")
    torch.cuda.synchronize()
    graph, ends_at = torch.cuda.CUDAGraph(), time.monotonic() + 2.5
    with torch.cuda.graph(graph):
        x += 1
        while time.monotonic() < ends_at:  # for longer than the thread sleeps
            time.sleep(0.05)
    graph.replay()
    torch.cuda.synchronize()
    assert x[0].item() == 1
    assert find_nvml() is not None
    watch.close()
