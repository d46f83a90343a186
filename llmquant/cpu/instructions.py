"""What functions that numba compiles call of LLVM: products of tiles, memory by its address, a counter for threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llmquant.cpu.vectors import (
    BYTE,
    DOTS,
    EIGHT_FLOATS,
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    LANES,
    PAIRS,
    added,
    at,
    constant,
    load,
    long,
    rounded,
    store,
    sum_of,
)

TOGETHER = 4  # rows of the weight that share what is loaded of x
SHARED = LANES // 4  # rows of x that share what is loaded of the weight, as many as there are registers for
LINE = 64  # bytes that a cache loads at a time


def _written(write: Callable[..., None]) -> Any:
    """Of write(b, *numbers), which appends to the code at b, a function that numba can call with a tuple of numbers."""

    @intrinsic
    def run(context, numbers):  # type: ignore[no-untyped-def]
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            write(b, *(b.extract_value(args[0], i) for i in range(numbers.count)))
            return context.get_dummy_value()

        return types.void(numbers), generate

    return run


@_written
def call(b: Any, address: Any, *given: Any) -> None:
    """(address of a loop, *Given)"""
    place = cgutils.alloca_once(b, INT64, len(given))
    for i, number in enumerate(given):
        b.store(number, b.gep(place, [ir.Constant(INT32, i)]))
    function = ir.FunctionType(ir.VoidType(), [INT64]).as_pointer()
    b.call(b.inttoptr(address, function), [b.ptrtoint(place, INT64)])


def _of_size(b: Any, size: Any, write: Callable[[Any], None]) -> None:
    """write(the vector of a chunk) for numbers of `size` bytes: float32, or bfloat16, twice as many to a chunk."""
    for kind, own in ((FLOATS, 4), (PAIRS, 2))[: 2 if DOTS else 1]:
        with b.if_then(b.icmp_signed("==", size, long(own))):
            write(kind)


@_written
def products(b: Any, size: Any, by: Any, *given: Any) -> None:
    """(bytes of a number; how many rows of x; what `_products_by` is given)"""

    def write(kind: Any) -> None:
        for own in sorted({1, 2, SHARED}):
            with b.if_then(b.icmp_signed("==", by, long(own))):
                _products_by(b, kind, own, *given)

    _of_size(b, size, write)


def _products_by(
    b: Any, kind: Any, by: int, tile: Any, tile_stride: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, chunks: Any
) -> None:
    """(address and bytes from row to row of: TOGETHER rows of the weight, `by` rows of x, products; chunks)

    Products are added to what is there. Each is the sum of the same LANES sums whatever `by` is.
    """
    places = [(i, j) for i in range(TOGETHER) for j in range(by)]
    sums = {place: cgutils.alloca_once_value(b, constant(0.0, FLOATS)) for place in places}
    rows = [b.add(tile, b.mul(tile_stride, long(i))) for i in range(TOGETHER)]
    others = [b.add(x, b.mul(x_stride, long(j))) for j in range(by)]
    with cgutils.for_range(b, chunks) as step:
        offset = b.mul(step.index, long(4 * LANES))
        own, other = ([load(b, at, kind, offset) for at in addresses] for addresses in (rows, others))
        for i, j in places:
            b.store(added(b, own[i], other[j], b.load(sums[i, j])), sums[i, j])
    for i, j in places:
        at = b.add(y, b.add(b.mul(y_stride, long(i)), long(4 * j)))
        store(b, b.fadd(load(b, at, FLOAT32), sum_of(b, b.load(sums[i, j]))), at)


@_written
def add_products(b: Any, size: Any, tile: Any, x: Any, y: Any) -> None:
    """(bytes of a number; addresses of a chunk, of one of x, and of what the sum of their products is added to)"""

    def write(kind: Any) -> None:
        total = sum_of(b, added(b, load(b, tile, kind), load(b, x, kind), constant(0.0, FLOATS)))
        store(b, b.fadd(load(b, y, FLOAT32), total), y)

    _of_size(b, size, write)


@_written
def copy(b: Any, target: Any, source: Any, count: Any) -> None:
    """(to address, from address, bytes)"""
    cgutils.raw_memcpy(b, at(b, target, BYTE), at(b, source, BYTE), count, 1)


@_written
def copy_eight(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), eight float32"""
    store(b, load(b, source, EIGHT_FLOATS), target)


@_written
def round_chunk(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), LANES float32 to bfloat16"""
    store(b, rounded(b, load(b, source, FLOATS)), target)


@_written
def prefetch(b: Any, address: Any, count: Any) -> None:
    """(address of what will be read soon, bytes)"""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    lines = b.udiv(b.add(count, long(LINE - 1)), long(LINE))
    with cgutils.for_range(b, lines) as line:
        place = at(b, address, BYTE, b.mul(line.index, long(LINE)))
        b.call(function, [place, *(ir.Constant(INT32, number) for number in (0, 3, 1))])  # to read, often, as data


def _reader(kind: Any, known: Any) -> Any:
    """A function that numba can call for the number at an address."""

    @intrinsic
    def read(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return load(b, args[0], kind)

        return known(types.intp), generate

    return read


float_at, byte_at = _reader(FLOAT32, types.float32), _reader(BYTE, types.uint8)


@intrinsic
def take(context, address, count):  # type: ignore[no-untyped-def]
    """Add `count` to the number at an address and give what was there: no two threads are given the same."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", at(b, args[0], INT64), args[1], "monotonic")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def pointer_to(context, address):  # type: ignore[no-untyped-def]
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return at(b, args[0], BYTE)

    return types.voidptr(types.intp), generate
