"""Code for a processor's vectors, in LLVM's language by llvmlite: the words that the loops over codes are written in.

Vectors have eight or sixteen numbers of 32 bits, by what the processor at hand has. It is plain LLVM, for any
processor, but for what DOTS stands for. `b` is the builder of llvmlite throughout: what is appended to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import binding, ir
from numba import config
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features

FEATURES = {*(config.CPU_FEATURES or get_host_cpu_features()).split(",")}
LANES = 16 if {"+avx512f", "+avx512bw", "+avx512dq", "+avx512vl"} <= FEATURES else 8  # columns at a time
EIGHT = 8  # codes begin on a whole byte every so many
# Whether pairs of bfloat16 are multiplied and added up in one instruction. LLVM took other types for it before 17.
DOTS = LANES == 16 and "+avx512bf16" in FEATURES and binding.llvm_version_info[0] >= 17
BYTE, INT16, INT32, INT64, FLOAT32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
BYTES, SHORTS, INTS, FLOATS = (ir.VectorType(kind, LANES) for kind in (BYTE, INT16, INT32, FLOAT32))


class BFloat16(ir.Type):
    """A type of LLVM's that llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"


PAIRS, PLACES = ir.VectorType(BFloat16(), 2 * LANES), ir.VectorType(INT16, 2 * LANES)
EIGHT_FLOATS = ir.VectorType(FLOAT32, EIGHT)


def at(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    return b.inttoptr(address if offset is None else b.add(address, offset), kind.as_pointer())


def load(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    loaded = b.load(at(b, address, kind, offset))
    loaded.align = 1
    return loaded


def store(b: Any, value: Any, address: Any, offset: Any = None) -> None:
    b.store(value, at(b, address, value.type, offset)).align = 1


def long(number: int) -> Any:
    return ir.Constant(INT64, number)


def constant(numbers: Any, kind: Any = INTS) -> Any:
    return ir.Constant(kind, numbers if isinstance(numbers, list) else [numbers] * kind.count)


def splat(b: Any, number: Any, kind: Any = FLOATS) -> Any:
    first = b.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
    return shuffle(b, first, first, [0] * kind.count)


def shuffle(b: Any, x: Any, y: Any, places: list[int]) -> Any:
    """Elements of x, and after them y, as one vector."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, len(places)), places))


def joined(b: Any, x: Any, y: Any) -> Any:
    return shuffle(b, x, y, [*range(2 * LANES)])


def each(b: Any, kind: Any, lane: Callable[[Any], Any]) -> Any:
    """The vector of lane(0), lane(1), .., each called with the lane's number as LLVM has it."""
    vector = ir.Constant(kind, ir.Undefined)
    for i in range(kind.count):
        place = ir.Constant(INT32, i)
        vector = b.insert_element(vector, lane(place), place)
    return vector


def sum_of(b: Any, vector: Any) -> Any:
    width = vector.type.count
    while width > 1:
        width //= 2
        low, high = (shuffle(b, vector, vector, [*range(first, first + width)]) for first in (0, width))
        vector = b.fadd(low, high)
    return b.extract_element(vector, ir.Constant(INT32, 0))


def added(b: Any, x: Any, y: Any, z: Any) -> Any:
    """z + x * y, rounded once where the processor can; of PAIRS, where DOTS, the products by two."""
    if x.type == PAIRS:
        kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
        return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), [z, x, y])
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def rounded(b: Any, value: Any) -> Any:
    """To bfloat16, as its bits. The instruction takes what is below 1e-38 for zero, as that of products does."""
    if "+avx512bf16" in FEATURES:
        return b.bitcast(b.fptrunc(value, ir.VectorType(PAIRS.element, LANES)), SHORTS)
    bits = b.bitcast(value, INTS)
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    bits = b.add(bits, b.add(odd, constant(0x7FFF)))
    bits = b.select(b.fcmp_unordered("uno", value, value), constant(0x7FC00000), bits)
    return b.trunc(b.lshr(bits, constant(16)), SHORTS)


class Sums:
    """Vectors of sums, which are zeros each time that the place in the code is passed where they are made."""

    def __init__(self, b: Any, count: int, kind: Any) -> None:
        self.b, self.places = b, [cgutils.alloca_once(b, kind) for _ in range(count)]
        for place in self.places:
            b.store(constant(0.0, kind), place)

    def add(self, number: int, x: Any, y: Any) -> None:
        """x * y to one of them."""
        self.b.store(added(self.b, x, y, self.b.load(self.places[number])), self.places[number])

    def all(self) -> list[Any]:
        return [self.b.load(place) for place in self.places]

    def total(self) -> Any:
        return reduce(self.b.fadd, self.all())


def steps(b: Any, count: Any, together: int, one: Callable[[Any, int], None]) -> None:
    """one(i, its place among those together) for i below count, so many at a time."""
    whole = b.udiv(count, long(together))
    with cgutils.for_range(b, whole) as step:
        for place in range(together):
            one(b.add(b.mul(step.index, long(together)), long(place)), place)
    if together > 1:
        rest = b.mul(whole, long(together))
        with cgutils.for_range(b, b.sub(count, rest)) as step:
            one(b.add(rest, step.index), 0)
