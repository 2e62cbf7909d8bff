"""Sums over the GPUs of a node inside a CUDA graph: microseconds a call by the size of the message, one JSON line each.

    python -m benchmarks.all_reduce [--gpus 2] [--kilobytes 8 512] [--calls 50]

`one_shot` is our kernel through peer memory, `one_shot_added` the same with the addition to the residual stream in it,
`nccl` NCCL's all-reduce, `torch_one_shot` and `torch_two_shot` those of PyTorch's symmetric memory. NVLink multicast is
off everywhere. The ranks' times are of the same calls, so that rank 0's are all that is printed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu_timing import graph_microseconds
from llm.core.partition import Partition
from llm.parallel.collectives import Collectives, connect
from llm.parallel.environment import ENVIRONMENT
from llm.parallel.peer_all_reduce import PeerAllReduce, PeerMemory

_HIDDEN_SIZE = 4096
_MOST_ONE_SHOT = 4 << 20
"""Bytes of the largest message of our kernel: more programs than this takes are not all on the GPU at once."""


class Bench:
    """One rank's messages, and the ways to sum them.

    Args:
        max_bytes: of the largest message.
    """

    def __init__(self, partition: Partition, directory: Path, max_bytes: int) -> None:
        self.device = torch.device("cuda", partition.rank)
        torch.cuda.set_device(self.device)
        connection = connect(partition, directory / "store", self.device, timeout_s=120)
        self.group = Collectives(connection, partition)
        memory = PeerMemory.on_gpus(self.group, partition, self.device, min(max_bytes, _MOST_ONE_SHOT))
        self.small = PeerAllReduce(memory, partition)
        self.x = torch.empty(max_bytes // 2, dtype=torch.bfloat16, device=self.device)
        self.total = torch.empty_like(self.x)

    def ways(self, num_bytes: int) -> dict[str, Callable[[], object]]:
        """What is measured."""
        x, total = self.x[: num_bytes // 2], self.total[: num_bytes // 2]
        ways: dict[str, Callable[[], object]] = {"nccl": partial(self.group.all_reduce, x)}
        if num_bytes <= self.small.max_bytes:
            ways["one_shot"] = partial(self.small.all_reduce, x)
            ways["one_shot_added"] = partial(self.small.add_all_reduce, x, total)
        return ways

    def check(self, num_bytes: int) -> None:
        """The kernel's sum is NCCL's, up to rounding, and the same on all ranks."""
        generator = torch.Generator(self.device).manual_seed(self.device.index)
        x = torch.randn(num_bytes // 2, generator=generator, device=self.device).bfloat16()
        theirs = self.group.all_reduce(x.clone())
        ours = self.small.all_reduce(x)
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-5)
        everywhere = self.group.all_gather(ours.view(torch.uint8))  # a format that NCCL sends
        assert bool((everywhere == everywhere[0]).all()), f"ranks differ at {num_bytes} bytes"


class TorchsOwn:
    """PyTorch's sums through symmetric memory."""

    def __init__(self, partition: Partition, directory: Path, max_bytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        store = dist.FileStore(str(directory / "torchs"), partition.size)
        dist.init_process_group("nccl", store=store, rank=partition.rank, world_size=partition.size, device_id=device)
        self.x = symm_mem.empty(max_bytes // 2, dtype=torch.bfloat16, device=device).zero_()
        self.name = dist.group.WORLD.group_name
        assert symm_mem.rendezvous(self.x, self.name).multicast_ptr == 0, "multicast is off"

    def ways(self, num_bytes: int) -> dict[str, Callable[[], object]]:
        """What is measured."""
        x, ops = self.x[: num_bytes // 2], torch.ops.symm_mem
        return {
            "torch_one_shot": partial(ops.one_shot_all_reduce, x, "sum", self.name),
            "torch_two_shot": partial(ops.two_shot_all_reduce_, x, "sum", self.name),
        }


def measure(rank: int, directory: Path, options: argparse.Namespace) -> None:
    """One rank's part."""
    partition, max_bytes = Partition(rank, options.gpus), max(options.kilobytes) << 10
    bench = Bench(partition, directory, max_bytes)
    try:
        torchs: TorchsOwn | None = TorchsOwn(partition, directory, max_bytes, bench.device)
    except RuntimeError as error:
        torchs = None
        print(f"no symmetric memory of PyTorch's: {error}", flush=True)
    for num_bytes in (kilobytes << 10 for kilobytes in options.kilobytes):
        if num_bytes <= bench.small.max_bytes:
            bench.check(num_bytes)
        bench.x.zero_()
        ways = bench.ways(num_bytes) | ({} if torchs is None else torchs.ways(num_bytes))
        line: dict[str, float] = {"bytes": num_bytes, "tokens": num_bytes // 2 / _HIDDEN_SIZE}
        for name, way in ways.items():
            bench.group.all_gather(torch.zeros(1, device=bench.device))  # all ranks begin together
            line[name] = round(graph_microseconds([way] * options.calls), 2)
        if rank == 0:
            print(json.dumps(line), flush=True)
    torch.cuda.synchronize()
    if torchs is not None:
        dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--kilobytes", nargs="+", type=int, default=[8 << i for i in range(12)])
    parser.add_argument("--calls", type=int, default=50, help="in the graph")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (Path(directory), options), nprocs=options.gpus)


if __name__ == "__main__":
    main()
