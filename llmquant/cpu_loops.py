"""Decoding on a CPU, compiled by numba: what llmquant_kernels.cpu_compiled multiplies with. One loop for all formats.

Eight codes at a time are cut out of the stream of bits, become levels in one of four ways, and take the scale of their
group. The eight lanes are written as vectors, since compilers do not find by themselves that two instructions of AVX2
look up eight numbers in a table of sixteen. It is plain LLVM, for any processor.

The loops are compiled at the first product and kept on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from llmquant_kernels.cpu_compiled import FLOAT, INTEGER, TABLE, TRITS, Encoded

LANES = 8
# Columns that are decoded at a time: with those of x they stay in the first cache. Whole bytes of trits and lanes.
COLUMNS = 1280
TOGETHER = 4  # rows of the weight that share what is loaded of x
# Multiplications below which another thread costs more than it gains.
LEAST_WORK = 2**18
# What a byte of micro-exponents multiplies sixteen columns by, (256, 16) float32.
HALVES = 1 - 0.5 * (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).repeat_interleave(2, dim=1).float()

FLOAT32, INT16, INT32, INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(FLOAT32, LANES), ir.VectorType(INT32, LANES)


class Weight(NamedTuple):
    """Encoded, as the compiled loops take it: where tensors lie, and sizes. Of arrays they would count the uses."""

    packed: int
    tail: int
    table: int
    scale: int
    scales: int
    zero: int
    outer: int
    offset: int
    micro: int
    rows: int
    columns: int
    groups: int
    stride: int  # bytes of a row
    spared: int  # the first row in tail
    table_stride: int  # bytes from row to row; 0 where there is one for all
    scale_stride: int
    scale_width: int  # bytes of a scale
    zero_stride: int
    outer_stride: int
    offset_stride: int
    offset_step: int  # bytes from group to group
    micro_stride: int  # 0: none
    halves: int  # what a byte of micro multiplies sixteen columns by
    bits: int
    group: int
    way: int
    sign: int
    mantissa: int
    exponent: int
    largest: int


def multiply(weight: Weight, x: Tensor) -> Tensor:
    """x (rows, in) float32, contiguous -> (rows, out) float32."""
    y = torch.zeros(x.shape[0], weight.rows)
    work = partial(_multiply, weight, x.numpy(), y.numpy())
    _in_threads(0, weight.rows, weight.columns * x.shape[0], work)
    return y


def decode(weight: Weight, start: int, out: Tensor) -> None:
    """Write the rows of the weight from `start` on to out (rows, in), float32 or bfloat16, contiguous."""
    empty, stop = torch.empty(0, 0), start + len(out)
    full, half = (out, empty.short()) if out.dtype == torch.float32 else (empty, out.view(torch.int16))
    work = partial(_decode, weight, full.numpy(), half.numpy(), start)
    _in_threads(start, stop, weight.columns, work)


def prepare(weight: Encoded) -> Weight:
    """Where its tensors lie: it does not keep them."""
    tensors, numbers = weight.parts()
    rows, columns = weight.shape
    groups, stride = weight.zero.shape[1], weight.packed.shape[1]

    def step(grid: Tensor) -> int:
        return grid.stride(0) * grid.element_size() if len(grid) > 1 else 0

    return Weight._make(
        [
            *(tensor.data_ptr() for tensor in tensors),
            *(rows, columns, groups, stride),
            rows - (len(weight.tail) - 16) // stride,
            step(weight.table),
            step(weight.scale),
            weight.scale.shape[1] // groups,
            step(weight.zero),
            step(weight.outer),
            step(weight.offset),
            4 if weight.offset.shape[1] > 1 else 0,
            weight.micro.shape[1],
            HALVES.data_ptr(),
            *numbers,
        ]
    )


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """process: a fork has none of the threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="llmquant")


def _in_threads(start: int, stop: int, each: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, last) for as many runs of rows as torch may use threads; each: multiplications of a row."""
    threads = max(1, min(torch.get_num_threads(), (stop - start) * each // LEAST_WORK, (stop - start) // TOGETHER))
    if threads == 1:
        return work(start, stop)
    step = -(-(stop - start) // (threads * TOGETHER)) * TOGETHER
    firsts = range(start, stop, step)
    pool = _pool(threads - 1, os.getpid())
    others = [pool.submit(work, first, min(first + step, stop)) for first in firsts[1:]]
    work(start, min(start + step, stop))
    for other in others:
        other.result()


# ---- eight codes at a time, in LLVM's language


def _at(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    return b.inttoptr(address if offset is None else b.add(address, offset), kind.as_pointer())


def _load(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    loaded = b.load(_at(b, address, kind, offset))
    loaded.align = 1
    return loaded


def _constant(number: Any, kind: Any = INTS) -> Any:
    return ir.Constant(kind, [number] * LANES)


def _splat(b: Any, number: Any, kind: Any) -> Any:
    first = b.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
    return b.shuffle_vector(first, first, _constant(0))


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the processor can."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _each(b: Any, kind: Any, lane: Callable[[Any], Any]) -> Any:
    """The vector of lane(0), lane(1), .., each called with the lane's number as LLVM has it."""
    vector = ir.Constant(kind, ir.Undefined)
    for i in range(LANES):
        place = ir.Constant(INT32, i)
        vector = b.insert_element(vector, lane(place), place)
    return vector


def _narrow(b: Any, at: Any, width: Any) -> Any:
    """Eight codes of up to 4 bits lie in one word: that word in every lane."""
    return _splat(b, _load(b, at, INT32), INTS)


def _wide(b: Any, at: Any, width: Any) -> Any:
    """Of up to 8 bits, in two: four lanes of each. The second begins at the byte where the fifth code does."""
    second = b.lshr(b.mul(width, ir.Constant(INT64, 4)), ir.Constant(INT64, 3))
    words = _splat(b, _load(b, at, INT32), INTS), _splat(b, _load(b, at, INT32, second), INTS)
    return b.shuffle_vector(*words, ir.Constant(INTS, [0, 0, 0, 0, 8, 8, 8, 8]))


def _from_table(b: Any, codes: Any, given: Any) -> Any:
    """Sixteen levels, eight in each of two registers."""
    low = b.and_(codes, _constant(7))
    halves = [_load(b, given.table, FLOATS, ir.Constant(INT64, 32 * half)) for half in range(2)]
    first, second = (_each(b, FLOATS, partial(_element, b, half, low)) for half in halves)
    upper = b.icmp_signed("<", b.shl(codes, _constant(28)), _constant(0))
    return b.select(upper, second, first)


def _element(b: Any, vector: Any, places: Any, lane: Any) -> Any:
    return b.extract_element(vector, b.extract_element(places, lane))


def _looked_up(b: Any, codes: Any, given: Any) -> Any:
    """Up to 256 levels, one by one."""

    def lane(i: Any) -> Any:
        offset = b.shl(b.zext(b.extract_element(codes, i), INT64), ir.Constant(INT64, 2))
        return _load(b, given.table, FLOAT32, offset)

    return _each(b, FLOATS, lane)


def _as_integer(b: Any, codes: Any, given: Any) -> Any:
    sign = _splat(b, given.sign, INTS)
    return b.sitofp(b.sub(b.xor(codes, sign), sign), FLOATS)


def _as_float(b: Any, codes: Any, given: Any) -> Any:
    """Sign | exponent | mantissa, as the upper bits of half precision, which processors convert, subnormal or not."""
    half = ir.VectorType(INT16, LANES)
    sign = _splat(b, given.sign, INTS)
    size = b.and_(codes, b.sub(sign, _constant(1)))
    negative = b.icmp_signed("!=", b.and_(codes, sign), _constant(0))
    placed = b.shl(size, _splat(b, b.sub(ir.Constant(INT32, 10), given.mantissa), INTS))
    placed = b.or_(placed, b.select(negative, _constant(0x8000), _constant(0)))
    value = b.fpext(b.bitcast(b.trunc(placed, half), ir.VectorType(ir.HalfType(), LANES)), FLOATS)
    value = b.fmul(value, _splat(b, given.factor, FLOATS))
    nan = b.icmp_signed(">", size, _splat(b, given.largest, INTS))
    return b.select(nan, _constant(float("nan"), FLOATS), value)


class _Given(NamedTuple):
    source: Any  # addresses, as integers
    target: Any
    table: Any
    chunks: Any  # of eight codes
    bits: Any
    zero: Any
    scale: Any
    offset: Any
    sign: Any
    mantissa: Any
    factor: Any
    largest: Any


def _chunks(words: Callable[..., Any], levels: Callable[..., Any], dot: bool) -> Any:
    """A function of _Given's fields that numba can call.

    It writes ``(level(code) - zero) * scale + offset`` to `target`; or, for a dot product, adds eight partial sums of
    ``(level(code) - offset) * x * scale`` to those at `target`, where x is at the address `zero`.
    """

    @intrinsic
    def run(context: Any, source, target, table, chunks, bits, zero, scale, offset, sign, mantissa, factor, largest):  # type: ignore[no-untyped-def]
        address, real, number = types.intp, types.float32, types.int32
        first = [address] * 6 if dot else [*[address] * 5, real]
        signature = types.void(*first, real, real, number, number, real, number)

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            given = _Given(*args)
            width = given.bits  # bits of a code, or bytes of eight
            start, mask = _places(b, width, words is _wide)
            scale, offset = _splat(b, given.scale, FLOATS), _splat(b, given.offset, FLOATS)
            if dot:
                sums = cgutils.alloca_once_value(b, ir.Constant(FLOATS, [0.0] * LANES))
            else:
                zero = _splat(b, given.zero, FLOATS)
            with cgutils.for_range(b, given.chunks) as loop:
                at = b.add(given.source, b.mul(loop.index, width))
                codes = b.and_(b.lshr(words(b, at, width), start), mask)
                value = levels(b, codes, given)
                place = b.shl(loop.index, ir.Constant(INT64, 5))
                if dot:
                    value = b.fsub(value, offset)  # not after the sum, of which little may be left
                    b.store(_fused(b, value, _load(b, given.zero, FLOATS, place), b.load(sums)), sums)
                else:
                    value = b.fadd(b.fmul(b.fsub(value, zero), scale), offset)
                    b.store(value, _at(b, given.target, FLOATS, place)).align = 4
            if dot:
                total = _fused(b, b.load(sums), scale, _load(b, given.target, FLOATS))
                b.store(total, _at(b, given.target, FLOATS)).align = 4
            return context.get_dummy_value()

        return signature, generate

    return run


def _places(b: Any, bits: Any, wide: bool) -> tuple[Any, Any]:
    """Where each of eight codes begins in the word of its lane, and the mask of a code."""
    bits = b.trunc(bits, INT32)
    start = _each(b, INTS, lambda i: b.mul(bits, i))
    if wide:
        fifth = b.mul(bits, ir.Constant(INT32, 4))
        moved = _splat(b, b.sub(b.and_(fifth, ir.Constant(INT32, 7)), fifth), INTS)
        first = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * 4 + [0] * 4)
        start = b.select(first, start, b.add(start, moved))
    one = ir.Constant(INT32, 1)
    return start, _splat(b, b.sub(b.shl(one, bits), one), INTS)


_table_chunks, _table_dot = (_chunks(_narrow, _from_table, dot) for dot in (False, True))
_gathered_chunks, _gathered_dot = (_chunks(_wide, _looked_up, dot) for dot in (False, True))
_integer_chunks, _integer_dot = (_chunks(_wide, _as_integer, dot) for dot in (False, True))
_float_chunks, _float_dot = (_chunks(_wide, _as_float, dot) for dot in (False, True))


def _eight(change: Callable[[Any, Any, Any], Any]) -> Any:
    """A function (target, source) of addresses that numba can call: eight floats become change(b, they, others)."""

    @intrinsic
    def run(context: Any, target: Any, source: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            value = change(b, _load(b, args[0], FLOATS), _load(b, args[1], FLOATS))
            b.store(value, _at(b, args[0], FLOATS)).align = 4
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return run


_copy_eight = _eight(lambda b, target, source: source)
_multiply_eight = _eight(lambda b, target, source: b.fmul(target, source))


def _reader(kind: Any, known: Any) -> Any:
    """A function that numba can call for the number at an address."""

    @intrinsic
    def read(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _load(b, args[0], kind)

        return known(types.intp), generate

    return read


_float_at = _reader(FLOAT32, types.float32)
_int_at = _reader(INT32, types.int32)
_byte_at = _reader(ir.IntType(8), types.uint8)


# ---- rows


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, kept on disk where there is a place for it."""
    compiler = partial(njit, nogil=True, error_model="numpy", **options)

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return compiler(cache=True)(function)
        except RuntimeError:
            return compiler()(function)

    return decorate


@_compiled(inline="always")
def _scale_at(w, row, g):  # type: ignore[no-untyped-def]
    """row: where the scales of the row begin."""
    if w.scale_width == 1:
        return _float_at(w.scales + 4 * np.int64(_byte_at(row + g)))
    if w.scale_width == 2:
        return _float_at(w.scales + 4 * (np.int64(_byte_at(row + 2 * g)) | np.int64(_byte_at(row + 2 * g + 1)) << 8))
    return _float_at(row + 4 * g)


@_compiled(inline="always")
def _source_of(w, r):  # type: ignore[no-untyped-def]
    return w.tail + (r - w.spared) * w.stride if r >= w.spared else w.packed + r * w.stride


@_compiled()
def _decode_columns(w, r, first, last, tile):  # type: ignore[no-untyped-def]
    """Columns [first, last) of row r to the front of tile, which has room for eight more; first as COLUMNS allows."""
    one = np.float32(1)
    source, table, target = _source_of(w, r) + first // 8 * w.bits, w.table + r * w.table_stride, tile.ctypes.data
    sign, mantissa, largest = np.int32(w.sign), np.int32(w.mantissa), np.int32(w.largest)
    factor = np.float32(2.0**w.exponent)
    scales, outer = w.scale + r * w.scale_stride, _float_at(w.outer + r * w.outer_stride)
    zeros, offsets = w.zero + r * w.zero_stride, w.offset + r * w.offset_stride
    micro = w.micro + r * w.micro_stride
    bits, way = w.bits, w.way
    apart = way == TRITS or (w.group % 8 != 0 and w.group < w.columns)  # levels first, then scales
    if way == TRITS:
        source = w.packed + r * w.stride + first // 5
        for i in range((last - first + 4) // 5):  # of the eight three are overwritten
            _copy_eight(target + 20 * i, table + 32 * np.int64(_byte_at(source + i)))
    c, g = first, first // w.group
    end = (g + 1) * w.group
    while c < last:
        end = min(end, last)
        scale = _scale_at(w, scales, g) * outer
        zero = np.float32(_int_at(zeros + 4 * g))
        offset = _float_at(offsets + w.offset_step * g)
        at, to, chunks = source + (c - first) // 8 * bits, target + 4 * (c - first), (end - c + 7) // 8
        if apart:
            if way != TRITS and c == first:
                scale, zero, offset, chunks, end = one, np.float32(0), np.float32(-0.0), (last - first + 7) // 8, last
            else:
                chunks = 0
        if way == TABLE and bits <= 4:
            _table_chunks(at, to, table, chunks, bits, zero, scale, offset, sign, mantissa, factor, largest)
        elif way == TABLE:
            _gathered_chunks(at, to, table, chunks, bits, zero, scale, offset, sign, mantissa, factor, largest)
        elif way == INTEGER:
            _integer_chunks(at, to, table, chunks, bits, zero, scale, offset, sign, mantissa, factor, largest)
        elif way == FLOAT:
            _float_chunks(at, to, table, chunks, bits, zero, scale, offset, sign, mantissa, factor, largest)
        if w.micro_stride:
            halves = w.halves + 64 * np.int64(_byte_at(micro + g))
            _multiply_eight(to, halves)
            if end - c > 8:
                _multiply_eight(to + 32, halves + 32)
        c, g = end, g + 1
        end += w.group
    if apart:
        c, g = first, first // w.group
        while c < last:
            end = min(last, (g + 1) * w.group)
            scale = _scale_at(w, scales, g) * outer
            zero = np.float32(_int_at(zeros + 4 * g))
            offset = _float_at(offsets + w.offset_step * g)
            for k in range(c - first, end - first):
                tile[k] = (tile[k] - zero) * scale + offset
            c, g = end, g + 1


@_compiled()
def _dot(w, r, x, sums, sums_of_groups):  # type: ignore[no-untyped-def]
    """Row r times x (columns + 7,) float32, whose last are zero; sums: room for eight; sums_of_groups: those of x."""
    source, table, target, from_x = _source_of(w, r), w.table + r * w.table_stride, sums.ctypes.data, x.ctypes.data
    sign, mantissa, largest = np.int32(w.sign), np.int32(w.mantissa), np.int32(w.largest)
    factor = np.float32(2.0**w.exponent)
    scales, outer = w.scale + r * w.scale_stride, _float_at(w.outer + r * w.outer_stride)
    zeros, offsets = w.zero + r * w.zero_stride, w.offset + r * w.offset_stride
    bits, way, none = w.bits, w.way, np.float32(0)
    width = w.group // 8
    last = (w.columns + 7) // 8 - (w.groups - 1) * width
    added = none
    sums[:] = none
    for g in range(w.groups):
        scale = _scale_at(w, scales, g) * outer
        chunks = last if g == w.groups - 1 else width
        at, own, zero = source + g * width * bits, from_x + 32 * g * width, np.float32(_int_at(zeros + 4 * g))
        if way == TABLE and bits <= 4:
            _table_dot(at, target, table, chunks, bits, own, scale, zero, sign, mantissa, factor, largest)
        elif way == TABLE:
            _gathered_dot(at, target, table, chunks, bits, own, scale, zero, sign, mantissa, factor, largest)
        elif way == INTEGER:
            _integer_dot(at, target, table, chunks, bits, own, scale, zero, sign, mantissa, factor, largest)
        elif way == FLOAT:
            _float_dot(at, target, table, chunks, bits, own, scale, zero, sign, mantissa, factor, largest)
        added += _float_at(offsets + w.offset_step * g) * sums_of_groups[g]
    for k in range(8):
        added += sums[k]
    return added


@_compiled()
def _decode(w, full, half, origin, start, stop):  # type: ignore[no-untyped-def]
    """Rows [start, stop) to full, float32, or to half, bfloat16, whose first row is row `origin`."""
    tile = np.empty(COLUMNS + 8, np.float32)
    bits = tile.view(np.int32)
    for r in range(start, stop):
        for first in range(0, w.columns, COLUMNS):
            last = min(first + COLUMNS, w.columns)
            _decode_columns(w, r, first, last, tile)
            if len(full):
                full[r - origin, first:last] = tile[: last - first]
                continue
            out = half[r - origin, first:last]
            for k in range(last - first):
                rounded = bits[k] + 0x7FFF + (bits[k] >> 16 & 1)
                out[k] = (rounded if tile[k] == tile[k] else 0x7FC00000) >> 16


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _add_products(tile, x, first, width, y, row, count):  # type: ignore[no-untyped-def]
    """To y[:, row : row + count] the products of tile (4, ..) with columns [first, first + width) of x."""
    for m in range(len(x)):
        own = x[m, first : first + width]
        a = b = c = d = np.float32(0)
        for k in range(width):
            a += tile[0, k] * own[k]
            b += tile[1, k] * own[k]
            c += tile[2, k] * own[k]
            d += tile[3, k] * own[k]
        y[m, row] += a
        if count > 1:
            y[m, row + 1] += b
        if count > 2:
            y[m, row + 2] += c
        if count > 3:
            y[m, row + 3] += d


@_compiled()
def _multiply(w, x, y, start, stop):  # type: ignore[no-untyped-def]
    """To y[:, start:stop] the products of x with rows [start, stop)."""
    if len(x) == 1 and w.way != TRITS and not w.micro_stride and (w.group % 8 == 0 or w.groups == 1):
        padded, sums = np.zeros(w.columns + 8, np.float32), np.empty(8, np.float32)
        padded[: w.columns] = x[0]
        sums_of_groups = np.empty(w.groups, np.float32)
        for g in range(w.groups):
            sums_of_groups[g] = padded[g * w.group : min((g + 1) * w.group, w.columns)].sum()
        for row in range(start, stop):
            y[0, row] = _dot(w, row, padded, sums, sums_of_groups)
        return
    tile = np.zeros((TOGETHER, COLUMNS + 8), np.float32)
    for row in range(start, stop, TOGETHER):
        count = min(TOGETHER, stop - row)
        for first in range(0, w.columns, COLUMNS):
            last = min(first + COLUMNS, w.columns)
            for r in range(count):
                _decode_columns(w, row + r, first, last, tile[r])
            _add_products(tile, x, first, last - first, y, row, count)
