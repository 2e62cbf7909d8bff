"""Sums over the GPUs of a node inside a CUDA graph: microseconds a call by the size of the message, one JSON line each.

    python -m benchmarks.all_reduce [--gpus 2] [--kilobytes 8 512] [--calls 50]
    python -m benchmarks.all_reduce --kilobytes 2048 65536 --programs 32 64 128 --chunk-words 2048 4096 --lags 1 2

`counted` is our kernel for small messages, `chunked` the one for large ones as engines use it, `…_added` the same with
the addition to the residual stream in it; `…_columns` brings messages of that size side by side to rank 0. With one of
the last line's options, `chunked` is measured with each combination of them, named by programs, words, lag and warps,
and by whether ranks own parts (`parts`) or all add up everything (`all`). `nccl` is NCCL's all-reduce, `torch_one_shot`
and `torch_two_shot` are those of PyTorch's symmetric memory. NVLink multicast is off everywhere. The ranks' times are
of the same calls, so that rank 0's are all that is printed.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu_timing import graph_microseconds
from llm.core.partition import Partition
from llm.kernels.chunked_all_reduce import Chunking
from llm.parallel.collectives import Collectives, connect
from llm.parallel.environment import ENVIRONMENT
from llm.parallel.peer_all_reduce import PeerAllReduce

_HIDDEN_SIZE = 4096
_MOST_COUNTED = 8 << 20
"""Bytes of the largest message that is measured with its counts."""
_MOST_COLUMNS = 1 << 16
"""Numbers of a row of which each rank has a part, such as logits."""


class Bench:
    """One rank's messages, and the ways to sum them.

    Args:
        max_bytes: of the largest message.
        chunkings: ways to cut large messages, by name.
    """

    def __init__(self, partition: Partition, directory: Path, max_bytes: int, chunkings: dict[str, Chunking]) -> None:
        self.device = torch.device("cuda", partition.rank)
        torch.cuda.set_device(self.device)
        connection = connect(partition, directory / "store", self.device, timeout_s=120)
        self.group = Collectives(connection, partition)
        make = partial(PeerAllReduce.on_gpus, self.group, partition, self.device)
        self.counted = make(max_small_bytes=min(max_bytes, _MOST_COUNTED))
        self.chunked = {name: make(max_small_bytes=1, chunking=chunking) for name, chunking in chunkings.items()} or {
            "chunked": make(max_small_bytes=1)
        }
        self.x = torch.empty(max_bytes // 2, dtype=torch.bfloat16, device=self.device)
        self.total = torch.empty_like(self.x)

    def _own(self, num_bytes: int) -> dict[str, PeerAllReduce]:
        counted = {"counted": self.counted} if num_bytes <= self.counted.max_small_bytes else {}
        return counted | self.chunked

    def ways(self, num_bytes: int) -> dict[str, Callable[[], object]]:
        """What is measured."""
        x, total = self.x[: num_bytes // 2], self.total[: num_bytes // 2]
        ways: dict[str, Callable[[], object]] = {"nccl": partial(self.group.all_reduce, x)}
        for name, peers in self._own(num_bytes).items():
            ways[name] = partial(peers.all_reduce, x)
            ways[f"{name}_added"] = partial(peers.add_all_reduce, x, total)
        rows = x.view(-1, min(len(x), _MOST_COLUMNS))
        ways["nccl_columns"] = partial(self.group.gather_columns, rows)
        for name, peers in self.chunked.items():
            ways[f"{name}_columns"] = partial(peers.gather_columns, rows)
        return ways

    def check(self, num_bytes: int) -> None:
        """The kernels' sums are NCCL's, up to rounding, and the same on all ranks."""
        generator = torch.Generator(self.device).manual_seed(self.device.index)
        x = torch.randn(num_bytes // 2, generator=generator, device=self.device).bfloat16()
        theirs = self.group.all_reduce(x.clone())
        for name, peers in self._own(num_bytes).items():
            ours = peers.all_reduce(x.clone())
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-5)
            everywhere = self.group.all_gather(ours.view(torch.uint8))  # a format that NCCL sends
            assert bool((everywhere == everywhere[0]).all()), f"ranks differ at {num_bytes} bytes ({name})"


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


def make_torchs_own(partition: Partition, directory: Path, max_bytes: int, device: torch.device) -> TorchsOwn | None:
    """PyTorch's way; None where it has none."""
    try:
        return TorchsOwn(partition, directory, max_bytes, device)
    except RuntimeError as error:
        print(f"no symmetric memory of PyTorch's: {error}", flush=True)
        return None


def chunkings_of(options: argparse.Namespace) -> dict[str, Chunking]:
    """The combinations that are asked for, by name; none if no option asks for any."""
    asked = options.programs, options.chunk_words, options.lags, options.warps, options.owns_parts
    if not any(asked):
        return {}
    usual = Chunking(owns_parts=options.gpus > 2)
    values = [values or [default] for values, default in zip(asked, usual, strict=True)]
    chunkings = [Chunking(*each[:-1], owns_parts=bool(each[-1])) for each in product(*values)]
    return {"chunked_{}_{}_{}_{}_".format(*each) + ("parts" if each.owns_parts else "all"): each for each in chunkings}


def measure(rank: int, directory: Path, options: argparse.Namespace) -> None:
    """One rank's part."""
    partition, max_bytes = Partition(rank, options.gpus), max(options.kilobytes) << 10
    bench = Bench(partition, directory, max_bytes, chunkings_of(options))
    torchs = None if options.no_torch else make_torchs_own(partition, directory, max_bytes, bench.device)
    for num_bytes in (kilobytes << 10 for kilobytes in options.kilobytes):
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
    parser.add_argument("--kilobytes", nargs="+", type=int, default=[8 << i for i in range(15)])
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's own kernels out")
    parser.add_argument("--programs", nargs="+", type=int, help="of the kernel for large messages")
    parser.add_argument("--chunk-words", nargs="+", type=int, help="words that one of its programs sends in a turn")
    parser.add_argument("--lags", nargs="+", type=int, help="turns between sending and using")
    parser.add_argument("--warps", nargs="+", type=int, help="of a program")
    parser.add_argument("--owns-parts", nargs="+", type=int, choices=(0, 1), help="each rank adds up a part")
    parser.add_argument("--calls", type=int, default=50, help="in the graph")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, (Path(directory), options), nprocs=options.gpus)


if __name__ == "__main__":
    main()
