"""What every kernel launch has in common."""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_RESERVED_SHARED_MEMORY = 1024
"""Bytes of a multiprocessor's that no program gets."""


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel be scheduled, then wait until the kernels before this one have written their results.

    With programmatic dependent launch (CUDA C++ programming guide, section 3.2.8) a kernel's programs come to life
    while the kernel before drains; everything that does not depend on it may go before this call.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_then_launch(PDL: tl.constexpr):
    """The other way round: the next kernel may read what kernels before this one wrote before it waits itself."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the 128-byte lines at `pointers` to be brought to the second-level cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], tl.int32, False, 1)


def num_warps(block: int) -> int:
    """Of a program that reads `block` numbers at once: 16 a thread, two loads of 16 bytes."""
    return min(max(block // 512, 1), 16)


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a format that models compute in."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch on `device`: programmatic dependent launch where the chip has it (Hopper on)."""
    if device.type != "cuda":
        return {"PDL": False}
    has_pdl = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


@cache
def most_stages(device: torch.device, bytes_a_stage: int, other_bytes: int = 0) -> int:
    """Stages of a pipelined loop for which a program on `device` has shared memory, one at least.

    Args:
        bytes_a_stage: of the tiles that are loaded at once.
        other_bytes: that the program needs beside them.
    """
    if device.type != "cuda":
        return 8
    properties = torch.cuda.get_device_properties(device)
    shared_memory = properties.shared_memory_per_multiprocessor - other_bytes
    return max(stages_in(shared_memory, bytes_a_stage, properties.major), 1)


def stages_in(shared_memory: int, bytes_a_stage: int, major: int) -> int:
    """The same for a chip of this compute capability with so many bytes of shared memory in a multiprocessor."""
    num_tiles = (shared_memory - _RESERVED_SHARED_MEMORY) // bytes_a_stage
    # Before Hopper the tiles that are being multiplied lie in registers.
    return num_tiles + 1 if major < 9 else num_tiles
