"""Triton kernels. Each has a plain torch reference in `llm` or in `tests/unit/kernels`; they know tensors only."""
