"""What the codes of a weight are on a CPU: how a chunk of them is read, which levels they stand for, what scales these.

A chunk is LANES columns. It is cut out of the stream of bits, becomes levels in one of three ways and takes the scale
of its group. Written as vectors, since compilers do not find by themselves that two instructions of AVX2 look up eight
numbers in a table of sixteen, and one of AVX-512 sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from llmquant.cpu.vectors import (
    BYTE,
    BYTES,
    EIGHT,
    EIGHT_FLOATS,
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    INTS,
    LANES,
    SHORTS,
    constant,
    each,
    load,
    long,
    shuffle,
    splat,
    steps,
    store,
)
from llmquant_kernels.cpu_compiled import FLOAT, INTEGER, TABLE, TRITS

TRITS_A_BYTE = 5


class Loop(NamedTuple):
    """What a loop is compiled for. The first seven are those of llmquant_kernels.cpu_compiled.Encoded."""

    way: int
    bits: int
    sign: int
    least: int
    mantissa: int
    exponent: int
    largest: int
    scale_width: int  # bytes
    chunks: int = 0  # of LANES columns in a group; 0 where that is told when it is called
    outer: bool = False  # scales have a scale
    halved: bool = False  # by micro-exponents
    zero: bool = False
    offset: bool = False
    by: int = 0  # rows of x that it multiplies by; 0: it writes what it decodes
    size: int = 4  # bytes of a number of x, or of what is written: float32 or bfloat16
    # Of bfloat16, where DOTS, two chunks are read as one: how many groups these lie in; 0: one is.
    pairs: int = 0
    long: bool = False  # groups are so long that to scale 128 levels for each costs little
    powers: bool = False  # scales are powers of two, and are added to exponents: see may_add

    @property
    def late(self) -> bool:
        """Whether what is the same for a whole row is left for the sum."""
        return self.by > 0 and not (self.pairs or self.zero or self.offset)

    @property
    def outer_late(self) -> bool:
        return self.outer and self.by > 0 and not self.offset and (self.pairs > 0 or self.late)

    @property
    def bare(self) -> bool:
        """Whether floating-point levels lack the factor 2**exponent, which scales or sums take."""
        return self.late or (self.pairs > 0 and not self.zero)

    @property
    def has_sign(self) -> bool:
        """Whether codes are a sign and seven bits of a size, for which a table of sizes is enough."""
        return self.way == FLOAT and self.sign == 128 and not self.zero and not self.offset

    @property
    def may_add(self) -> bool:
        """Whether scales that are powers of two are better added to exponents of levels than multiplied with these."""
        plain = self.way != TRITS and not self.zero and not self.offset
        return plain and not self.long and (self.halved or self.bits > 4) and (self.bits <= 6 or self.has_sign)

    @property
    def looked_up(self) -> bool:
        """Whether floating-point levels come from a table: where it fits a register."""
        return self.way == FLOAT and self.bits <= 4 and LANES == 16

    @property
    def in_words(self) -> bool:
        """Whether codes are read into lanes of 32 bits, not 16."""
        return self.bits <= 4 and (self.way != FLOAT or self.looked_up)

    @property
    def floats(self) -> Any:
        """The vector of a chunk of levels. Bytes of five digits are multiplied in lanes of eight."""
        return EIGHT_FLOATS if self.way == TRITS and self.by and not self.pairs else FLOATS


class Given(NamedTuple):
    """What a loop is called with: addresses, and numbers of 64 bits."""

    source: Any
    target: Any  # of the numbers that are decoded, or of those that the sums are added to, one for each row of x
    x: Any
    x_stride: Any  # bytes from row to row
    table: Any
    scale: Any
    scales: Any  # what scales of 8 and 16 bits stand for
    outer: Any
    zero: Any
    zero_step: Any  # bytes from group to group
    offset: Any
    offset_step: Any
    micro: Any
    chunks: Any  # of LANES columns; of one, where trits are multiplied
    per: Any  # of these in a group


def rows_of(b: Any, kind: Loop, given: Given) -> list[Any]:
    return [b.add(given.x, b.mul(given.x_stride, long(j))) for j in range(kind.by)]


def groups_of(b: Any, given: Given, per: Any) -> Any:
    """How many groups of `per` chunks `given.chunks` makes, the last of which may be short."""
    return b.udiv(b.add(given.chunks, b.sub(per, long(1))), per)


def within(b: Any, given: Given, first: Any, per: Any) -> Any:
    left = b.sub(given.chunks, first)
    return b.select(b.icmp_signed("<", left, per), left, per)


def each_chunk(b: Any, kind: Loop, given: Given, first: Any, together: int, one: Callable[[Any, int], None]) -> None:
    """one(chunk, counted from `first`, and its place) for each of the group that begins there, as `steps` does."""
    if not kind.chunks:
        return steps(b, within(b, given, first, given.per), together, one)
    for place in range(kind.chunks):
        one(long(place), place)


def add_to_sum(b: Any, kind: Loop, given: Given, j: int, total: Any) -> None:
    """The total of row j of x to what is there of it."""
    total = b.fmul(total, load(b, given.outer, FLOAT32)) if kind.outer_late else total
    at = b.add(given.target, long(4 * j))
    store(b, b.fadd(load(b, at, FLOAT32), total), at)


def reading_of(b: Any, kind: Loop) -> Callable[[Any], Any]:
    bits, eights = kind.bits, range(LANES // EIGHT)
    if kind.way == TRITS:  # levels, which lie there already
        return lambda at: load(b, at, FLOATS)
    if kind.in_words:  # of eight codes, which goes to eight lanes
        shift = constant([32 - bits * (lane % EIGHT + 1) for lane in range(LANES)])

        def read_words(at: Any) -> Any:
            words = [splat(b, load(b, at, INT32, long(bits * i)), INTS) for i in eights]
            return b.shl(shuffle(b, words[0], words[-1], _halves()), shift)

        return read_words
    if bits == 8:
        return lambda at: b.shl(b.zext(load(b, at, BYTES), SHORTS), constant(8, SHORTS))
    # Each lies in two bytes, which go to a lane of 16 bits.
    starts = [divmod(bits * lane, 8) for lane in range(EIGHT)]
    pairs = [EIGHT * i + min(place + j, 7) for i in eights for place, _ in starts for j in (0, 1)]
    shift = constant([16 - bits - late for _ in eights for _, late in starts], SHORTS)

    def read_bytes(at: Any) -> Any:
        loaded = [load(b, at, ir.VectorType(BYTE, EIGHT), long(bits * i)) for i in eights]
        return b.shl(b.bitcast(shuffle(b, loaded[0], loaded[-1], pairs), SHORTS), shift)

    return read_bytes


def _halves() -> list[int]:
    """Where the lower lanes of one vector and the upper ones of another are, the same one where it has eight lanes."""
    return [lane + (LANES if lane >= EIGHT else 0) for lane in range(LANES)]


def _from_table(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Of up to sixteen levels, which fill one register or two; of more, one by one."""
    registers = [load(b, table, FLOATS, long(4 * first)) for first in range(0, 16, LANES)]

    def of_many(codes: Any) -> Any:
        places = b.lshr(codes, constant(16 - kind.bits, SHORTS))

        def lane(i: Any) -> Any:
            return load(b, table, FLOAT32, b.shl(b.zext(b.extract_element(places, i), INT64), long(2)))

        return each(b, FLOATS, lane)

    return of_many if kind.bits > 4 else lambda codes: _looked_up(b, kind.bits, registers, codes)


def _looked_up(b: Any, bits: int, registers: list[Any], codes: Any) -> Any:
    """For each code of up to four bits what the registers hold there."""

    def element(register: Any, places: Any, lane: Any) -> Any:
        return b.extract_element(register, b.extract_element(places, lane))

    if len(registers) == 1 or bits < 4:
        return each(b, FLOATS, partial(element, registers[0], b.lshr(codes, constant(32 - bits))))
    places = b.and_(b.lshr(codes, constant(28)), constant(7))
    first, second = (each(b, FLOATS, partial(element, register, places)) for register in registers)
    return b.select(b.icmp_signed("<", codes, constant(0)), second, first)


def _as_integer(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Two's complement or without a sign, less `least`."""
    vector = INTS if kind.in_words else SHORTS
    down = constant(vector.element.width - kind.bits, vector)

    def level(codes: Any) -> Any:
        size = b.ashr(codes, down) if kind.sign else b.lshr(codes, down)
        if not kind.in_words:
            size = b.sext(size, INTS) if kind.sign else b.zext(size, INTS)
        return b.sitofp(b.sub(size, constant(kind.least)) if kind.least else size, FLOATS)

    return level


def _as_float(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Sign | exponent | mantissa, as the upper bits of half precision, which processors convert, subnormal or not."""
    if kind.looked_up:
        levels = all_levels(b, kind, table)
        return lambda codes: _looked_up(b, kind.bits, levels, codes)
    exponents, down, greatest = (kind.bits - 1 - kind.mantissa, 10 - kind.mantissa, kind.sign - 1)

    def level(codes: Any) -> Any:
        upper = b.ashr(codes, constant(5 - exponents, SHORTS))
        value = b.and_(upper, constant(greatest << down | -(2**15), SHORTS))
        if kind.largest < greatest:
            size = b.and_(upper, constant(greatest << down, SHORTS))
            beyond = b.icmp_signed(">", size, constant(kind.largest << down, SHORTS))
            value = b.or_(value, b.sext(beyond, SHORTS))  # all bits: NaN
        value = b.fpext(b.bitcast(value, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        if not kind.bare:
            value = b.fmul(value, constant(2.0**kind.exponent, FLOATS))
        # Of a product zeros may have any sign.
        return b.fadd(value, constant(0.0, FLOATS)) if kind.least and not kind.by else value

    return level


def all_levels(b: Any, kind: Loop, table: Any) -> list[Any]:
    """The levels of all codes in registers, as often as it takes to fill one."""
    firsts = range(0, max(LANES, 2**kind.bits), LANES)
    if kind.way == TABLE:
        return [load(b, table, FLOATS, long(4 * first)) for first in firsts]
    if kind.way == TRITS:
        digits = [float(code % 3) for code in range(LANES)]
        return [b.fadd(splat(b, load(b, table, FLOAT32)), constant(digits, FLOATS))]
    values = np.resize(levels_of(kind), max(LANES, 2**kind.bits))
    values = values * (1.0 if kind.bare else 2.0**kind.exponent)
    values += 0.0 if kind.least and kind.way == FLOAT else -0.0
    return [constant(values[first : first + LANES].tolist(), FLOATS) for first in firsts]


def levels_of(kind: Loop) -> Any:
    """What INTEGER and FLOAT make of each code, the latter but for the factor 2**exponent, as numpy.float64."""
    codes = np.arange(2**kind.bits)
    size = codes % kind.sign if kind.sign else codes
    if kind.way == INTEGER:
        return (size - (codes & kind.sign) - kind.least).astype(np.float64)
    bits = size << (10 - kind.mantissa) | (codes & kind.sign) << (16 - kind.bits)
    values = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    values[size > kind.largest] = np.nan
    return values


def _as_it_is(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    return lambda levels: levels


LEVELS = {TABLE: _from_table, INTEGER: _as_integer, FLOAT: _as_float, TRITS: _as_it_is}


class Grid(NamedTuple):
    """What a group has, in every lane; None: it has none."""

    scale: Any
    zero: Any
    offset: Any
    micro: Any


def grid_of(b: Any, kind: Loop, given: Given, g: Any) -> Grid:
    at = b.mul(g, long(kind.scale_width))
    if kind.scale_width == 4:
        scale = load(b, given.scale, FLOAT32, at)
    else:
        code = load(b, given.scale, ir.IntType(8 * kind.scale_width), at)
        scale = load(b, given.scales, FLOAT32, b.shl(b.zext(code, INT64), long(2)))
    zero, offset, micro = None, None, None
    if kind.outer and not kind.outer_late:
        scale = b.fmul(scale, load(b, given.outer, FLOAT32))
    if kind.bare and not kind.late:
        scale = b.fmul(scale, ir.Constant(FLOAT32, 2.0**kind.exponent))
    if kind.zero:
        zero = splat(b, load(b, given.zero, FLOAT32, b.mul(g, given.zero_step)))
    if kind.offset:
        offset = splat(b, load(b, given.offset, FLOAT32, b.mul(g, given.offset_step)))
    if kind.halved:
        micro = splat(b, b.zext(load(b, given.micro, BYTE, g), INT32), INTS)
    return Grid(splat(b, scale, kind.floats), zero, offset, micro)


def scaled(b: Any, grid: Grid, value: Any, place: int = 0) -> Any:
    """A chunk of levels, the place-th of a group, as weights."""
    value = b.fmul(placed(b, grid, value, place), grid.scale)
    return value if grid.offset is None else b.fadd(value, grid.offset)


def placed(b: Any, grid: Grid, value: Any, place: int) -> Any:
    """A chunk of levels, the place-th of a group, less its zero, or halved."""
    if grid.zero is not None:
        value = b.fsub(value, grid.zero)
    if grid.micro is not None:
        bits = b.shl(grid.micro, constant([31 - (LANES * place + lane) // 2 for lane in range(LANES)]))
        halves = b.icmp_signed("<", bits, constant(0))
        value = b.fmul(value, b.select(halves, constant(0.5, FLOATS), constant(1.0, FLOATS)))
    return value
