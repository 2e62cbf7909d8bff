"""Triton kernels of paged attention. Each has a plain torch reference in `tests/unit/attention`."""
