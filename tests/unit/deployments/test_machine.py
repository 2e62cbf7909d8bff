"""Where a replica says it runs, from the process itself and from NVIDIA's driver, to `/rayline/stats`."""

import ctypes
import mmap
import os
import socket
import time

import pytest
from in_process import ServiceFactory, eventually
from test_fleet import IDLE

from deployments.channel.messages import Condition, Gpu, Machine, Report, encode
from deployments.replica.machine import MachineWatch, gpu_indices
from deployments.replica.nvml import Nvml

GIB = 1 << 30


class Driver:
    """NVML's functions as the library has them, for one GPU of 80 GiB; any other name is unknown to it."""

    def __init__(self, init_status: int = 0) -> None:
        self.init_status = init_status

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.init_status

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle) -> int:  # noqa: N802
        handle._obj.value = 0xABCD
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory) -> int:  # noqa: N802
        assert handle.value == 0xABCD
        # As the header has it: total, free, used.
        ctypes.memmove(memory, (ctypes.c_ulonglong * 3)(80 * GIB, 50 * GIB, 30 * GIB), 24)
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, rates) -> int:  # noqa: N802
        ctypes.memmove(rates, (ctypes.c_uint * 2)(87, 12), 8)
        return 0


def test_what_the_driver_says():
    nvml = Nvml(Driver())
    assert nvml.memory("GPU-1") == (30 * GIB, 80 * GIB)
    assert nvml.busy_percent("GPU-1") == 87
    assert nvml.memory("GPU-2") is None
    assert nvml.busy_percent("MIG-1") is None
    with pytest.raises(OSError, match="initialized"):
        Nvml(Driver(init_status=9))


@pytest.mark.parametrize(
    ("device", "num_gpus", "indices"),
    [
        ("cuda", 1, [0]),
        ("cuda:0", 1, [0]),
        ("cuda:3", 1, [3]),
        ("cuda:0", 4, [0, 1, 2, 3]),
        ("cpu", 2, []),
        ("none", 1, []),
    ],
)
def test_the_gpus_of_a_replica(device: str, num_gpus: int, indices: list[int]):
    assert gpu_indices(device, num_gpus) == indices


def test_a_process_without_a_gpu_tells_its_cores_and_memory():
    watch = MachineWatch([], num_cores=2)
    first = watch.latest
    assert (first.node, first.pid, first.num_cores, first.gpus) == (socket.gethostname(), os.getpid(), 2, [])
    # Mapped anew: memory that was freed before would be used again, and the process would not grow.
    ballast = mmap.mmap(-1, 64 << 20)
    ballast.write(os.urandom(1 << 20) * 64)
    ends_at = time.process_time() + 0.3
    while watch.latest is first or time.process_time() < ends_at:
        pass
    watch.close()
    latest = watch._look()
    assert latest.memory_bytes - first.memory_bytes > 32 << 20
    assert watch.latest.busy_cores > 0
    del ballast


async def test_stats_tell_where_each_replica_runs(make_service: ServiceFactory):
    service = await make_service(num_replicas=2)
    await eventually(lambda: len(service.router.fleet.replica_ids) == 2)
    replicas = (await service.http.get("/rayline/stats")).json()["replicas"]
    for replica in replicas.values():
        assert replica["machine"]["node"] == socket.gethostname()
        assert replica["machine"]["memory_bytes"] > 1 << 20
        assert replica["machine"]["gpus"] == []


async def test_a_replica_of_several_gpus_tells_each(make_service: ServiceFactory):
    """As it comes over the channel; a replica of an earlier version that says nothing of it is shown without."""
    service = await make_service(num_replicas=1)
    await eventually(lambda: len(service.router.fleet.replica_ids) == 1)
    gpus = [Gpu(index, "NVIDIA H200", 70 * GIB, 140 * GIB, 93) for index in range(2)]
    condition = Condition(service.router.journal.fingerprint, machine=Machine("node-7", 41, GIB, 16, 1.5, gpus))
    service.router._watch.take_report(Report("other", IDLE, condition=condition))
    service.router._watch.take_report(Report("older", IDLE))
    replicas = service.router.snapshot()["replicas"]
    assert replicas["older"]["machine"] is None
    assert [gpu["used_bytes"] for gpu in replicas["other"]["machine"]["gpus"]] == [70 * GIB, 70 * GIB]
    assert replicas["other"]["machine"]["gpus"][1] == {
        "index": 1, "name": "NVIDIA H200", "used_bytes": 70 * GIB, "total_bytes": 140 * GIB, "busy_percent": 93,
    }  # fmt: skip
    assert len(encode(condition)) < 200, "it goes with ten reports a second"
