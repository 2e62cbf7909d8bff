"""Triton's interpreter without the work that it repeats for nothing.

A kernel's operation on a few numbers costs it a tenth of a millisecond, nearly all of it its own bookkeeping. What a
kernel computes, reads and writes stays as it is.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Sizes = tuple[int, ...]
"""Of a block; a scalar has none."""


def quicken() -> None:
    """Patch the interpreter, in this process and for good; more than once does no harm."""
    if interpreter._patch_lang.__module__ == __name__:
        return
    # Each sum and product of integers is checked for overflow, and the outcome given to an assertion that is off.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = _patching_once(interpreter._patch_lang)
    interpreter._patch_attr = _patch_member
    interpreter._get_np_dtype = _looking_up(interpreter._get_np_dtype)
    interpreter._validate_np_data_size = _fits
    interpreter.TensorHandle.__init__ = _create_handle
    tl.core._unwrap_if_constexpr = _looking_at_type_first(tl.core._unwrap_if_constexpr)
    tl.core.dtype.__eq__ = _same_first(tl.core.dtype.__eq__)
    tl.core.block_type.__init__ = _create_block_type
    tl.core.block_type.name = property(lambda self: f"<{self.sizes}, {self.element_ty}>")
    tl.core.tensor.__init__ = _create_tensor
    TritonSemantic.to_tensor = _keeping_numbers(TritonSemantic.to_tensor)
    TritonSemantic.scalar_constant = _keeping_constants(TritonSemantic.scalar_constant)
    TritonSemantic.cast = _casting_what_differs(TritonSemantic.cast)
    TritonSemantic.binary_op_type_checking_impl = _passing_what_agrees(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.broadcast_impl_value = _broadcast


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


def _patch_member(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A function of the language gets what it works with in one call and not in three."""
    semantic, function = TritonSemantic(builder), inspect.unwrap(member)

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return function(*args, **kwargs)

    scope.set_attr(place, name, call)


def _fits(data: np.ndarray, dtype: tl.dtype) -> bool:
    """Whether numbers take no more room than their type has; pointers are not asked."""
    return dtype.is_ptr() or data.itemsize * 8 <= max(dtype.primitive_bitwidth, 8)


def _create_handle(self: interpreter.TensorHandle, data: Any, dtype: tl.dtype, attr: dict | None = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
    if not _fits(data, dtype):
        self.__post_init__()  # says what is wrong


_NOTHING_TO_UNWRAP = {int, bool, float, str, type(None), tl.core.tensor, tl.core.dtype, tl.core.block_type}


def _looking_at_type_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: value if type(value) in _NOTHING_TO_UNWRAP else unwrap(value)


def _same_first(equals: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equals(self, other)


@cache
def _shape_of(sizes: Sizes) -> tuple[tl.tuple, int, tl.tuple, tl.constexpr]:
    """Sizes and number of elements, for a type and for a tensor: nobody changes them, so all of a shape share them."""
    num_elements = validate_block_shape(sizes)
    constants = [tl.constexpr(size) for size in sizes]
    return tl.tuple(sizes), num_elements, tl.tuple(constants), tl.constexpr(num_elements)


def _create_block_type(self: tl.core.block_type, element_ty: tl.dtype, shape: Any) -> None:
    sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.sizes = element_ty, sizes
    self.shape, self.numel, *_ = _shape_of(sizes)


def _create_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    *_, self.shape, self.numel = _shape_of(_sizes_of(type))


def _sizes_of(type: tl.dtype) -> Sizes:
    return type.sizes if type.is_block() else ()


def _keeping_numbers(to_tensor: Callable[..., Any]) -> Callable[..., Any]:
    """A number of Python's is made a tensor once."""
    kept: dict[tuple, Any] = {}

    def number_to_tensor(self: TritonSemantic, x: Any, check_type: bool = True) -> Any:
        if (kind := type(x)) not in (int, float, bool):
            return to_tensor(self, x, check_type)
        if (found := kept.get((kind, x))) is None:
            found = kept[kind, x] = to_tensor(self, x)
        return found

    return number_to_tensor


def _keeping_constants(scalar_constant: Callable[..., Any]) -> Callable[..., Any]:
    """A number of a type is made a tensor once."""
    kept: dict[tuple, Any] = {}

    def constant(self: TritonSemantic, value: Any, dtype: tl.dtype) -> Any:
        if (kind := type(value)) not in (int, float, bool):
            return scalar_constant(self, value, dtype)
        if (found := kept.get((kind, value, dtype.name))) is None:
            found = kept[kind, value, dtype.name] = scalar_constant(self, value, dtype)
        return found

    return constant


def _casting_what_differs(cast: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor of the type that is asked for stays as it is, without a look at anything else."""

    def cast_unless_same(self: TritonSemantic, input: tl.tensor, dst_ty: tl.dtype, *rounding: Any, **named: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding, **named)

    return cast_unless_same


def _passing_what_agrees(check: Callable[..., Any]) -> Callable[..., Any]:
    """Operands whose types have been together before are not checked again, nor written out to their common shape.

    NumPy's operations, which is what all operations of two operands are here, give them that shape.
    """
    # (Types are kept beside what was found for them, so that no other gets their place in memory.)
    constants: dict[tuple, tuple[tl.dtype, tl.tensor]] = {}
    common_types: dict[tuple, tuple[tl.dtype, tl.dtype, tl.dtype]] = {}

    def pass_or_check(
        self: TritonSemantic, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        rules = (allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            left, right = lhs.dtype, rhs.dtype
            if left is right and not div_or_mod and not left.is_ptr():
                return _shaped_alike(lhs, rhs)
            if (allow_lhs_ptr and left.is_ptr() and right.is_int()) or (
                allow_rhs_ptr and right.is_ptr() and left.is_int()
            ):
                return _shaped_alike(lhs, rhs)
            key = (id(left), id(right), rules)
            if (found := common_types.get(key)) is not None:
                return _shaped_alike(self.cast(lhs, found[0]), self.cast(rhs, found[0]))
            checked = check(self, lhs, rhs, *rules)
            if (common := checked[0].dtype) is checked[1].dtype and arithmetic_check and not common.is_ptr():
                common_types[key] = (common, left, right)
            return checked
        number, tensor = (rhs, lhs) if isinstance(lhs, tl.tensor) else (lhs, rhs)
        if not isinstance(tensor, tl.tensor) or type(number) not in (int, float) or tensor.dtype.is_ptr():
            return check(self, lhs, rhs, *rules)
        place = (number is rhs, type(number), number, id(tensor.dtype), rules)
        is_zero = number == 0 and type(number) is float  # 0.0 and -0.0 are one key
        if is_zero or (kept := constants.get(place)) is None:
            checked = check(self, lhs, rhs, *rules)
            if (common := checked[0].dtype) is checked[1].dtype and arithmetic_check:
                constants[place] = (tensor.dtype, self.scalar_constant(number, dtype=common))
            return checked
        constant = kept[1]
        tensor = self.cast(tensor, constant.dtype)
        return _shaped_alike(tensor, constant) if number is rhs else _shaped_alike(constant, tensor)

    return pass_or_check


@cache
def _common_sizes(left: Sizes, right: Sizes) -> Sizes:
    rank = max(len(left), len(right))
    pairs = zip(*((1,) * (rank - len(sizes)) + sizes for sizes in (left, right)), strict=True)
    common = tuple(b if a == 1 else a for a, b in pairs)
    np.broadcast_shapes(left, right)  # says what does not go together
    return common


def _broadcast(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both in the shape that they have together."""
    left, right = _sizes_of(lhs.type), _sizes_of(rhs.type)
    if left == right:
        return lhs, rhs
    sizes = _common_sizes(left, right)
    return _spread(lhs, left, sizes), _spread(rhs, right, sizes)


def _spread(tensor: tl.tensor, own: Sizes, sizes: Sizes) -> tl.tensor:
    if own == sizes:
        return tensor
    data, dtype = tensor.handle.data, tensor.dtype
    data = np.broadcast_to(data, sizes) if own else np.full(sizes, data, dtype=interpreter._get_np_dtype(dtype))
    return tl.tensor(interpreter.TensorHandle(data, dtype), _block_of(dtype, sizes))


def _shaped_alike(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Both with the type that they have together, for an operation of NumPy's: what it gives has the shape too."""
    left, right = _sizes_of(lhs.type), _sizes_of(rhs.type)
    if left == right:
        return lhs, rhs
    sizes = _common_sizes(left, right)
    if left != sizes:
        lhs = tl.tensor(lhs.handle, _block_of(lhs.dtype, sizes))
    if right != sizes:
        rhs = tl.tensor(rhs.handle, _block_of(rhs.dtype, sizes))
    return lhs, rhs


_blocks: dict[tuple[int, Sizes], tl.block_type] = {}


def _block_of(dtype: tl.dtype, sizes: Sizes) -> tl.block_type:
    """The type of a block, made once; pointers have types of their own at each launch."""
    if dtype.is_ptr():
        return tl.block_type(dtype, sizes)
    if (found := _blocks.get((id(dtype), sizes))) is None:
        found = _blocks[id(dtype), sizes] = tl.block_type(dtype, sizes)  # which keeps its dtype
    return found
