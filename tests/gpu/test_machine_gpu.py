"""What a replica tells of its GPUs, against torch's own figures and while a kernel keeps one busy."""

import threading
import time

import pytest
import torch

from deployments.replica.nvml import find_nvml

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def uuid_of(device: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def test_the_driver_knows_torchs_gpu_its_memory_and_its_use():
    nvml, uuid = find_nvml(), uuid_of(0)
    assert nvml is not None
    ballast = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    matrix, ends_at = torch.randn(8192, 8192, device="cuda"), time.monotonic() + 3
    while time.monotonic() < ends_at:
        matrix @ matrix
        torch.cuda.synchronize()
    busy_percent, memory = nvml.busy_percent(uuid), nvml.memory(uuid)
    assert memory is not None
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    # NVML counts what the driver keeps for itself, which the runtime leaves out of both.
    assert memory[1] == pytest.approx(total_bytes, rel=0.02)
    assert memory[0] == pytest.approx(total_bytes - free_bytes, abs=2 << 30)
    assert memory[0] >= ballast.nbytes
    assert busy_percent is not None
    assert busy_percent > 50


def test_a_replica_tells_its_gpu():
    pytest.importorskip("msgspec")
    from deployments.replica.machine import MachineWatch

    watch = MachineWatch([0], num_cores=1)
    (gpu,) = watch.latest.gpus
    watch.close()
    assert gpu.name == torch.cuda.get_device_name()
    assert gpu.used_bytes <= gpu.total_bytes
    assert gpu.busy_percent is not None


def test_looking_is_cheap_and_leaves_graphs_alone():
    """Another thread asks the driver while a graph is captured: the capture must not notice."""
    nvml, uuid, is_over = find_nvml(), uuid_of(0), threading.Event()
    assert nvml is not None
    durations: list[float] = []

    def look() -> None:
        while not is_over.wait(0.02):
            started = time.monotonic()
            torch.cuda.memory_reserved(0), nvml.memory(uuid), nvml.busy_percent(uuid)
            durations.append(time.monotonic() - started)

    thread = threading.Thread(target=look)
    thread.start()
    x = torch.zeros(16, device="cuda")
    torch.cuda.synchronize()
    graph, num_before = torch.cuda.CUDAGraph(), len(durations)
    with torch.cuda.graph(graph):
        x += 1
        while len(durations) < num_before + 10:
            time.sleep(0.01)
    graph.replay()
    torch.cuda.synchronize()
    assert x[0].item() == 1
    is_over.set()
    thread.join()
    assert sorted(durations)[len(durations) // 2] < 0.05
