"""Triton's interpreter without the work that it repeats for nothing.

A kernel's operation on a few numbers costs it a tenth of a millisecond, nearly all of it its own bookkeeping. What a
kernel computes, reads and writes stays as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter


def quicken() -> None:
    """Patch the interpreter, in this process and for good; more than once does no harm."""
    if interpreter._patch_lang.__module__ == __name__:
        return
    # Each sum and product of integers is checked for overflow, and the outcome given to an assertion that is off.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _looking_up(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _create_block_type
    tl.core.tensor.__init__ = _create_tensor


class _KeptPatches:
    """Stands for a scope of patches, which outlive it."""

    def restore(self) -> None:
        pass


def _patching_once(patch_language: Callable[[Any], Any]) -> Callable[[Any], _KeptPatches]:
    """`triton.language` is patched for the first function that uses it, and not at every call of every function."""
    patched: set[frozenset[int]] = set()

    @cache
    def modules_of(function: Any) -> frozenset[int]:
        values = function.__globals__.values()
        return frozenset(id(value) for value in values if isinstance(value, ModuleType) and value in (tl, tl.core))

    def patch(function: Any) -> _KeptPatches:
        if modules_of(function) not in patched:
            patch_language(function)
            patched.add(modules_of(function))
        return _KeptPatches()

    return patch


def _looking_up(numpy_type_of: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """The table of types is made once, and not at every question."""
    look_up = cache(numpy_type_of)

    def numpy_type(type: tl.dtype) -> np.dtype:
        scalar = type.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else look_up(scalar)

    return numpy_type


@cache
def _shape_of(sizes: tuple[int, ...]) -> tuple[tl.tuple, int, tl.tuple, tl.constexpr]:
    """Sizes and number of elements, for a type and for a tensor: nobody changes them, so all of a shape share them."""
    num_elements = validate_block_shape(sizes)
    constants = [tl.constexpr(size) for size in sizes]
    return tl.tuple(sizes), num_elements, tl.tuple(constants), tl.constexpr(num_elements)


def _create_block_type(self: tl.core.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, *_ = _shape_of(sizes)
    self.name = f"<{sizes}, {element_ty}>"


def _create_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    *_, self.shape, self.numel = _shape_of(tuple(type.shape) if type.is_block() else ())
