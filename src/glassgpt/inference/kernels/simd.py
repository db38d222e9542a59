"""Vectors and atomic counters for the kernels: what plain Numba loops can't say.

    total = dot_pairs(total, load_int8(weights, i), load_pair(x, k))

LLVM turns most loops into vector instructions by itself; not so the product of small integers,
two pairs in each 32-bit lane, that every processor has, nor a prefetch, nor an addition that two
threads may do at once. Each function here is one of these. Vectors have 16 lanes, or 32 of
16-bit numbers; LLVM splits them where registers are shorter.

This module is built on parts of Numba that are not its public interface (`numba.core`). They change
with Numba's versions, so pyproject.toml names the versions that the tests have passed with: before
widening that range, run tests/unit/test_cpu_engine.py. This module knows nothing of models.
"""

# Numba gives each intrinsic a first argument that callers do not write.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import platform
import sys

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

# Sums may be reordered, so that they can be vectors; NaN and infinity keep their meaning.
FLAGS = {"reassoc", "contract", "nsz", "arcp"}
fast = njit(nogil=True, fastmath=FLAGS, error_model="numpy")
LANES = 16
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
HAS_FLOAT16 = "+f16c" in _FEATURES or platform.machine() in ("aarch64", "arm64")
_BYTE, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_INTS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, 2 * LANES)


class _Vector(types.Type):
    """A value that lives in vector registers; `layout` says what it is to LLVM."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Vector({name})")
        self.kind = name

    @property
    def layout(self) -> ir.VectorType:
        return {"floats": _FLOATS, "ints": _INTS, "shorts": _SHORTS}[self.kind]


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, fe_type.layout)


_floats, _ints, _shorts = _Vector("floats"), _Vector("ints"), _Vector("shorts")


def _address(context, builder, kind, array, index, target: ir.Type):
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _load(target: ir.Type, align: int):
    """Code for `f(array, index)`: what stands there, taken as `target`."""

    def generate(context, builder, signature, args):
        value = builder.load(_address(context, builder, signature.args[0], *args, target))
        value.align = align
        return value

    return generate


def _splat(builder, scalar, like: ir.VectorType):
    """The scalar in every lane."""
    nothing = ir.Constant(like, ir.Undefined)
    first = builder.insert_element(nothing, scalar, _I32(0))
    everywhere = ir.Constant(ir.VectorType(_I32, like.count), [0] * like.count)
    return builder.shuffle_vector(first, nothing, everywhere)


# -- memory: arrays are flat (1-D, contiguous), indices count their elements ----------------------


@intrinsic
def load_floats(typing, array, index):  # float32, or float16 kept as uint16 -> 16 floats
    def from_halves(context, builder, signature, args):
        return builder.fpext(_load(_HALVES, 2)(context, builder, signature, args), _FLOATS)

    halves = array.dtype == types.uint16
    return _floats(array, types.intp), from_halves if halves else _load(_FLOATS, 4)


@intrinsic
def load_shorts(typing, array, index):  # int16 -> 32 shorts
    return _shorts(array, types.intp), _load(_SHORTS, 2)


@intrinsic
def load_int8(typing, array, index):  # int8 -> 32 shorts
    def generate(context, builder, signature, args):
        raw = _load(ir.VectorType(_BYTE, 2 * LANES), 1)(context, builder, signature, args)
        return builder.sext(raw, _SHORTS)

    return _shorts(array, types.intp), generate


@intrinsic
def load_pair(typing, array, index):  # int16 -> two neighbours, as one 32-bit number
    return types.int32(array, types.intp), _load(_I32, 2)


@intrinsic
def store_floats(typing, array, index, vector):  # float32, or float16 kept as uint16
    def generate(context, builder, signature, args):
        array, index, vector = args
        halves = signature.args[0].dtype == types.uint16
        if halves:
            for sign, beyond in ((1, ">"), (-1, "<")):  # the largest there is, not infinity
                limit = ir.Constant(_FLOATS, [sign * 65504.0] * LANES)
                vector = builder.select(builder.fcmp_ordered(beyond, vector, limit), limit, vector)
            vector = builder.fptrunc(vector, _HALVES)
        where = _address(context, builder, signature.args[0], array, index, vector.type)
        builder.store(vector, where).align = 2 if halves else 4
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def prefetch(typing, array, index):  # ask for a cache line that will be needed soon
    def generate(context, builder, signature, args):
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        where = _address(context, builder, signature.args[0], *args, _BYTE)
        read, keep, data = _I32(0), _I32(3), _I32(1)
        builder.call(function, [where, read, keep, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


# -- arithmetic ----------------------------------------------------------------------------------


@intrinsic
def no_floats(typing):  # 16 zeros
    return _floats(), lambda context, builder, signature, args: ir.Constant(_FLOATS, [0.0] * LANES)


@intrinsic
def no_ints(typing):
    return _ints(), lambda context, builder, signature, args: ir.Constant(_INTS, [0] * LANES)


def _pair_products(builder, a, b):
    """32 shorts x 32 shorts -> 16 ints, a[2i] * b[2i] + a[2i + 1] * b[2i + 1]."""
    wide = "+avx512bw" in _FEATURES
    if not wide and "+avx2" not in _FEATURES:
        nothing = ir.Constant(_SHORTS, ir.Undefined)

        def half(vector, first):
            lanes = ir.Constant(_INTS, list(range(first, 2 * LANES, 2)))
            return builder.sext(builder.shuffle_vector(vector, nothing, lanes), _INTS)

        even, odd = (builder.mul(half(a, i), half(b, i)) for i in (0, 1))
        return builder.add(even, odd)
    name = "llvm.x86.avx512.pmaddw.d.512" if wide else "llvm.x86.avx2.pmadd.wd"
    parts = 1 if wide else 2
    kind = ir.FunctionType(
        ir.VectorType(_I32, LANES // parts), [ir.VectorType(_I16, 2 * LANES // parts)] * 2
    )
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    if wide:
        return builder.call(function, [a, b])

    def piece(vector, first):
        lanes = ir.Constant(_INTS, list(range(first, first + LANES)))
        return builder.shuffle_vector(vector, vector, lanes)

    low, high = (builder.call(function, [piece(a, i), piece(b, i)]) for i in (0, LANES))
    return builder.shuffle_vector(low, high, ir.Constant(_INTS, list(range(LANES))))


@intrinsic
def dot_pairs(typing, total, weights, x):
    """ints + (32 shorts, two per lane) . (one pair, the same in every lane) -> ints"""

    def generate(context, builder, signature, args):
        total, weights, x = args
        everywhere = builder.bitcast(_splat(builder, x, _INTS), _SHORTS)
        return builder.add(total, _pair_products(builder, weights, everywhere))

    return _ints(total, weights, x), generate


@intrinsic
def nibble(typing, vector, index):  # shorts of four signed 4-bit numbers each -> the index-th
    def generate(context, builder, signature, args):
        vector, index = args
        above = builder.sub(_I16(12), builder.shl(builder.trunc(index, _I16), _I16(2)))
        shifted = builder.shl(vector, _splat(builder, above, _SHORTS))
        return builder.ashr(shifted, ir.Constant(_SHORTS, [12] * (2 * LANES)))

    return _shorts(vector, types.intp), generate


def _plus_product(builder, total, factor, scale, scale_type):
    """total + factor * scale; the scale is a vector, or one number for all lanes."""
    if not isinstance(scale_type, _Vector):
        scale = _splat(builder, scale, _FLOATS)
    product = builder.fmul(factor, scale, flags=["contract"])
    return builder.fadd(total, product, flags=["contract"])


@intrinsic
def add_scaled(typing, total, ints, scale):  # floats + ints * scale (floats, or one float)
    def generate(context, builder, signature, args):
        total, ints, scale = args
        floats = builder.sitofp(ints, _FLOATS)
        return _plus_product(builder, total, floats, scale, signature.args[2])

    return _floats(total, ints, scale), generate


@intrinsic
def multiply_add(typing, total, a, scale):  # floats + floats * scale (floats, or one float)
    def generate(context, builder, signature, args):
        return _plus_product(builder, *args, signature.args[2])

    return _floats(total, a, scale), generate


@intrinsic
def sum_of(typing, vector):  # floats -> their sum
    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), _FLOATS])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        zero = ir.Constant(ir.FloatType(), -0.0)
        return builder.call(function, [zero, args[0]], fastmath=["reassoc"])

    return types.float32(vector), generate


@intrinsic
def bits_of_float(typing, x):  # float32 -> its pattern, an int32
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def float_of_bits(typing, bits):  # int32 -> the float32 with this pattern
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


# -- threads -------------------------------------------------------------------------------------


@intrinsic
def fetch_add(typing, array, index, amount):
    """array[index] += amount, undivided by other threads -> what stood there before (int64)."""

    def generate(context, builder, signature, args):
        array, index, amount = args
        where = _address(context, builder, signature.args[0], array, index, ir.IntType(64))
        return builder.atomic_rmw("add", where, amount, "acq_rel")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def read_shared(typing, array, index):  # int64 that other threads change
    def generate(context, builder, signature, args):
        where = _address(context, builder, signature.args[0], *args, ir.IntType(64))
        return builder.load_atomic(where, "acquire", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def give_way(typing):  # let another thread have this core, if one is waiting for it
    def generate(context, builder, signature, args):
        if sys.platform != "win32":
            kind = ir.FunctionType(_I32, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate
