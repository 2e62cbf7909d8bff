"""Kernels compile for a GPU. Triton's interpreter, which runs them in the other tests, takes more than its compiler."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.timeout(1000)
def test_kernels_compile_for_a_gpu(tmp_path):
    """Those of attention and products, every two formats together that an engine can ask for; no GPU is needed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # for debuggers; it takes a tenth of the time
    script = Path(__file__).with_name("compile_for_gpus.py")
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=1000, cwd=Path(__file__).parents[3],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[3]), "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = Counter(run.stdout.splitlines())
    assert compiled == {
        "norm": 6,
        "norm behind": 2,
        "embed": 2,
        "soft cap": 1,
        "activation": 6,
        "rounding": 1,
        "scaling": 1,
        "shares": 2,
        "rope": 4,
        "delta rule": 3,
        "chunks": 4,
        "short convolution": 2,
        "tails": 2,
        "gated norm": 2,
        "gates": 2,
        "single row": 6,
        "tile": 6,
        "groups": 11,
        "groups on Hopper": 3,
        "floats written out": 2,
        "written out": 3,
        "row of groups": 2,
        "cuts": 6,
        "best of blocks": 6,
        "best of rows": 2,
        "adjust": 2,
        "log probabilities": 4,
        "entries": 1,
        "latent decode": 7,
        "latent prefill": 7,
        "latents": 1,
        "norm of columns": 1,
        "turned queries": 1,
        "heads": 4,
        "plan of copies": 1,
        "copies": 2,
        "long prefill": 2,
        "logits of experts": 9,
        "choice of experts": 5,
        "routes": 8,
        "order of pairs": 1,
        "experts": 12,
        "experts in groups": 14,
        "experts with adapters": 5,
        "experts in groups with adapters": 2,
        "shrink pairs": 5,
        "sum of experts": 1,
        "single sum": 2,
        "all-reduce": 3,
        "sums in chunks": 3,
        "columns in chunks": 6,
        "decode": 9,
        "decode in 8 bits": 3,
        "prefill": 9,
        "merge": 1,
        "stages": 6,
        "shrink": 4,
        "expand": 4,
        "gated expand": 4,
        "product with adapters": 3,
    }
