"""Conversions of one number in compiled loops, to the instructions that processors have for many at once."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_16, _32 = ir.IntType(16), ir.IntType(32)
_Signature = tuple[Any, Callable[..., Any]]
_intrinsic: Callable[[Callable[..., _Signature]], Callable[..., Any]] = intrinsic


@_intrinsic
def of_float16(typing_context: Any, bits: Any) -> _Signature:
    """Return the float32 of a float16, which is given as its bits, uint16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], _HALF), _FLOAT)

    return types.float32(types.uint16), generate


@_intrinsic
def to_float16(typing_context: Any, value: Any) -> _Signature:
    """Return the bits, uint16, of the float16 nearest to a float32; of two equally near ones, the even one."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], _HALF), _16)

    return types.uint16(types.float32), generate


@_intrinsic
def of_bfloat16(typing_context: Any, bits: Any) -> _Signature:
    """Return the float32 of a bfloat16, which is given as its bits, uint16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _32), _32(16)), _FLOAT)

    return types.float32(types.uint16), generate


@_intrinsic
def to_bfloat16(typing_context: Any, value: Any) -> _Signature:
    """Return the bits, uint16, of the bfloat16 nearest to a float32; of two equally near ones, the even one.

    Those of a NaN may be of another number.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], _32)
        is_odd = builder.and_(builder.lshr(bits, _32(16)), _32(1))
        nearest = builder.add(builder.add(bits, _32(0x7FFF)), is_odd)
        return builder.trunc(builder.lshr(nearest, _32(16)), _16)

    return types.uint16(types.float32), generate
