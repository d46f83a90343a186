"""The loops over the codes of a weight on a CPU, written in LLVM's language and compiled by numba for one format each.

Eight codes at a time, sixteen with AVX-512, are cut out of the stream of bits, become levels in one of three ways and
take the scale of their group. They are written as vectors, since compilers do not find by themselves that two
instructions of AVX2 look up eight numbers in a table of sixteen, and one of AVX-512 sixteen. It is plain LLVM, for any
processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import cfunc, config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from llmquant_kernels.cpu_compiled import FLOAT, INTEGER, TABLE, TRITS

FEATURES = {*(config.CPU_FEATURES or get_host_cpu_features()).split(",")}
LANES = 16 if {"+avx512f", "+avx512bw", "+avx512dq", "+avx512vl"} <= FEATURES else 8  # columns at a time
EIGHT = 8  # codes begin on a whole byte every so many
# Whether pairs of bfloat16 are multiplied and added up in one instruction. LLVM took other types for it before 17.
DOTS = LANES == 16 and "+avx512bf16" in FEATURES and binding.llvm_version_info[0] >= 17
TOGETHER = 4  # rows of the weight that share what is loaded of x
SHARED = LANES // 4  # rows of x that share what is loaded of the weight, as many as there are registers for
# Of a group of so many chunks of LANES columns, side by side: no addition waits for the last one.
SUMS = {1: 1, 2: 1, 4: 1, 8: 2, 16: 4, 0: 4}
BF16_MANTISSA = 7
CHAINS = 8  # sums of products of pairs side by side: an addition takes so many cycles, or less
LINE = 64  # bytes that a cache loads at a time
TRITS_A_BYTE, TRITS_TOGETHER = 5, 3

BYTE, INT16, INT32, INT64, FLOAT32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
BYTES, SHORTS, INTS, FLOATS = (ir.VectorType(kind, LANES) for kind in (BYTE, INT16, INT32, FLOAT32))


class BFloat16(ir.Type):
    """A type of LLVM's that llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"


PAIRS, PLACES = ir.VectorType(BFloat16(), 2 * LANES), ir.VectorType(INT16, 2 * LANES)
EIGHT_FLOATS = ir.VectorType(FLOAT32, EIGHT)


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
    powers: bool = False  # scales are powers of two, and no weight is too large for bfloat16

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


def kept_on_disk(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """The function as numba's compiler makes it, once for all processes where there is a place for it."""
    try:
        return compiler(cache=True)(function)
    except RuntimeError:
        return compiler()(function)


@cache
def loop(kind: Loop) -> Any:
    """A function that `call` can call by its `address`, as long as it is held."""
    text = " ".join(str(int(number)) for number in kind)

    def run(at):  # type: ignore[no-untyped-def]
        _run_over_codes(text, at)

    # numba keeps an index for each name. Two processes that write into one may give a loop the code of another.
    run.__qualname__ = "_".join(["run", *text.split()])
    return kept_on_disk(partial(cfunc, types.void(types.intp)), run)


@intrinsic(prefer_literal=True)
def _run_over_codes(context, text, at):  # type: ignore[no-untyped-def]
    """text: a Loop; at: where a Given lies."""
    kind = Loop._make(int(number) for number in text.literal_value.split())

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        given = Given(*(_load(b, args[1], INT64, _long(8 * i)) for i in range(len(Given._fields))))
        _over_codes(b, kind, given)
        return context.get_dummy_value()

    return types.void(text, types.intp), generate


def _written(write: Callable[..., None]) -> Any:
    """Of write(b, *numbers), which appends to the code at b, a function that numba can call with a tuple of numbers."""

    @intrinsic
    def run(context, numbers):  # type: ignore[no-untyped-def]
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            write(b, *(b.extract_value(args[0], i) for i in range(numbers.count)))
            return context.get_dummy_value()

        return types.void(numbers), generate

    return run


# ---- numbers and vectors


def _at(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    return b.inttoptr(address if offset is None else b.add(address, offset), kind.as_pointer())


def _load(b: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    loaded = b.load(_at(b, address, kind, offset))
    loaded.align = 1
    return loaded


def _store(b: Any, value: Any, address: Any, offset: Any = None) -> None:
    b.store(value, _at(b, address, value.type, offset)).align = 1


def _long(number: int) -> Any:
    return ir.Constant(INT64, number)


def _constant(numbers: Any, kind: Any = INTS) -> Any:
    return ir.Constant(kind, numbers if isinstance(numbers, list) else [numbers] * kind.count)


def _splat(b: Any, number: Any, kind: Any = FLOATS) -> Any:
    first = b.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
    return _shuffle(b, first, first, [0] * kind.count)


def _shuffle(b: Any, x: Any, y: Any, places: list[int]) -> Any:
    """Elements of x, and after them y, as one vector."""
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(INT32, len(places)), places))


def _each(b: Any, kind: Any, lane: Callable[[Any], Any]) -> Any:
    """The vector of lane(0), lane(1), .., each called with the lane's number as LLVM has it."""
    vector = ir.Constant(kind, ir.Undefined)
    for i in range(kind.count):
        place = ir.Constant(INT32, i)
        vector = b.insert_element(vector, lane(place), place)
    return vector


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the processor can."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _sum(b: Any, vector: Any) -> Any:
    width = vector.type.count
    while width > 1:
        width //= 2
        low, high = (_shuffle(b, vector, vector, [*range(first, first + width)]) for first in (0, width))
        vector = b.fadd(low, high)
    return b.extract_element(vector, ir.Constant(INT32, 0))


# ---- where codes come from: a function of an address that gives LANES of them, each in the upper bits of its lane


def _reading(b: Any, kind: Loop) -> Callable[[Any], Any]:
    bits, eights = kind.bits, range(LANES // EIGHT)
    if kind.way == TRITS:  # levels, which lie there already
        return lambda at: _load(b, at, FLOATS)
    if kind.in_words:  # of eight codes, which goes to eight lanes
        shift = _constant([32 - bits * (lane % EIGHT + 1) for lane in range(LANES)])

        def read_words(at: Any) -> Any:
            words = [_splat(b, _load(b, at, INT32, _long(bits * i)), INTS) for i in eights]
            return b.shl(_shuffle(b, words[0], words[-1], _halves()), shift)

        return read_words
    if bits == 8:
        return lambda at: b.shl(b.zext(_load(b, at, BYTES), SHORTS), _constant(8, SHORTS))
    # Each lies in two bytes, which go to a lane of 16 bits.
    starts = [divmod(bits * lane, 8) for lane in range(EIGHT)]
    pairs = [EIGHT * i + min(place + j, 7) for i in eights for place, _ in starts for j in (0, 1)]
    shift = _constant([16 - bits - late for _ in eights for _, late in starts], SHORTS)

    def read_bytes(at: Any) -> Any:
        loaded = [_load(b, at, ir.VectorType(BYTE, EIGHT), _long(bits * i)) for i in eights]
        return b.shl(b.bitcast(_shuffle(b, loaded[0], loaded[-1], pairs), SHORTS), shift)

    return read_bytes


def _halves() -> list[int]:
    """Where the lower lanes of one vector and the upper ones of another are, the same one where it has eight lanes."""
    return [lane + (LANES if lane >= EIGHT else 0) for lane in range(LANES)]


# ---- what codes become: a function of what the former gives, LANES levels, float32


def _from_table(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Of up to sixteen levels, which fill one register or two; of more, one by one."""
    registers = [_load(b, table, FLOATS, _long(4 * first)) for first in range(0, 16, LANES)]

    def of_many(codes: Any) -> Any:
        places = b.lshr(codes, _constant(16 - kind.bits, SHORTS))

        def lane(i: Any) -> Any:
            return _load(b, table, FLOAT32, b.shl(b.zext(b.extract_element(places, i), INT64), _long(2)))

        return _each(b, FLOATS, lane)

    return of_many if kind.bits > 4 else lambda codes: _looked_up(b, kind.bits, registers, codes)


def _looked_up(b: Any, bits: int, registers: list[Any], codes: Any) -> Any:
    """For each code of up to four bits what the registers hold there."""

    def element(register: Any, places: Any, lane: Any) -> Any:
        return b.extract_element(register, b.extract_element(places, lane))

    if len(registers) == 1 or bits < 4:
        return _each(b, FLOATS, partial(element, registers[0], b.lshr(codes, _constant(32 - bits))))
    places = b.and_(b.lshr(codes, _constant(28)), _constant(7))
    first, second = (_each(b, FLOATS, partial(element, register, places)) for register in registers)
    return b.select(b.icmp_signed("<", codes, _constant(0)), second, first)


def _as_integer(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Two's complement or without a sign, less `least`."""
    vector = INTS if kind.in_words else SHORTS
    down = _constant(vector.element.width - kind.bits, vector)

    def level(codes: Any) -> Any:
        size = b.ashr(codes, down) if kind.sign else b.lshr(codes, down)
        if not kind.in_words:
            size = b.sext(size, INTS) if kind.sign else b.zext(size, INTS)
        return b.sitofp(b.sub(size, _constant(kind.least)) if kind.least else size, FLOATS)

    return level


def _as_float(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Sign | exponent | mantissa, as the upper bits of half precision, which processors convert, subnormal or not."""
    if kind.looked_up:
        levels = _all_levels(b, kind, table)
        return lambda codes: _looked_up(b, kind.bits, levels, codes)
    exponents, down, greatest = (kind.bits - 1 - kind.mantissa, 10 - kind.mantissa, kind.sign - 1)

    def level(codes: Any) -> Any:
        upper = b.ashr(codes, _constant(5 - exponents, SHORTS))
        value = b.and_(upper, _constant(greatest << down | -(2**15), SHORTS))
        if kind.largest < greatest:
            size = b.and_(upper, _constant(greatest << down, SHORTS))
            beyond = b.icmp_signed(">", size, _constant(kind.largest << down, SHORTS))
            value = b.or_(value, b.sext(beyond, SHORTS))  # all bits: NaN
        value = b.fpext(b.bitcast(value, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        if not kind.bare:
            value = b.fmul(value, _constant(2.0**kind.exponent, FLOATS))
        # Of a product zeros may have any sign.
        return b.fadd(value, _constant(0.0, FLOATS)) if kind.least and not kind.by else value

    return level


def _all_levels(b: Any, kind: Loop, table: Any) -> list[Any]:
    """The levels of all codes in registers, as often as it takes to fill one."""
    firsts = range(0, max(LANES, 2**kind.bits), LANES)
    if kind.way == TABLE:
        return [_load(b, table, FLOATS, _long(4 * first)) for first in firsts]
    if kind.way == TRITS:
        digits = [float(code % 3) for code in range(LANES)]
        return [b.fadd(_splat(b, _load(b, table, FLOAT32)), _constant(digits, FLOATS))]
    values = np.resize(levels_of(kind), max(LANES, 2**kind.bits))
    values = values * (1.0 if kind.bare or kind.way == INTEGER else 2.0**kind.exponent)
    values += 0.0 if kind.least and kind.way == FLOAT else -0.0
    return [_constant(values[first : first + LANES].tolist(), FLOATS) for first in firsts]


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


# ---- loops


def _over_codes(b: Any, kind: Loop, given: Given) -> None:
    """Write ``(level - zero) * scale * half + offset`` to target, or add to it the sums of these times rows of x."""
    if kind.pairs:
        return _in_pairs(b, kind, given)
    if not kind.by:
        return _decoded(b, kind, given)
    for j, eight in enumerate(_multiplied_trits(b, kind, given) if kind.way == TRITS else _multiplied(b, kind, given)):
        total = _sum(b, eight)
        if kind.late:
            total = b.fmul(total, ir.Constant(FLOAT32, 2.0**kind.exponent))
            total = b.fmul(total, _load(b, given.outer, FLOAT32)) if kind.outer_late else total
        at = b.add(given.target, _long(4 * j))
        _store(b, b.fadd(_load(b, at, FLOAT32), total), at)


def _groups(b: Any, given: Given, per: Any) -> Any:
    """A loop over the groups that `given.chunks` makes, the last of which may be short."""
    return cgutils.for_range(b, b.udiv(b.add(given.chunks, b.sub(per, _long(1))), per))


def _within(b: Any, given: Given, first: Any, per: Any) -> Any:
    left = b.sub(given.chunks, first)
    return b.select(b.icmp_signed("<", left, per), left, per)


def _decoded(b: Any, kind: Loop, given: Given) -> None:
    read, level = _reading(b, kind), LEVELS[kind.way](b, kind, given.table)
    width = _long(4 * LANES if kind.way == TRITS else kind.bits * LANES // 8)
    per = _long(kind.chunks) if kind.chunks else given.per
    with _groups(b, given, per) as group:
        first, grid = b.mul(group.index, per), _grid(b, kind, given, group.index)

        def one(chunk: Any, place: int) -> None:
            i = b.add(first, chunk)
            value = _scaled(b, grid, level(read(b.add(given.source, b.mul(i, width)))), place)
            value = value if kind.size == 4 else _rounded(b, value)
            _store(b, value, given.target, b.mul(i, _long(kind.size * LANES)))

        if kind.chunks:
            for place in range(kind.chunks):
                one(_long(place), place)
        else:
            _steps(b, _within(b, given, first, per), 1, one)


def _multiplied(b: Any, kind: Loop, given: Given) -> list[Any]:
    """For each row of x a vector of sums of levels times x. Those of a group are added up, and then take its scale."""
    read, level = _reading(b, kind), LEVELS[kind.way](b, kind, given.table)
    per, together = (_long(kind.chunks) if kind.chunks else given.per, max(1, SUMS[kind.chunks] // kind.by))
    totals, rows = _Sums(b, kind, kind.by), _rows(b, kind, given)
    width = _long(kind.bits * LANES // 8)
    with _groups(b, given, per) as group:
        first, grid = b.mul(group.index, per), _grid(b, kind, given, group.index)
        sums = [_Sums(b, kind, together) for _ in rows]
        shifts = [_Sums(b, kind, together) for _ in rows] if kind.offset else []

        def one(chunk: Any, place: int) -> None:
            i, own = b.add(first, chunk), place % together
            value = _placed(b, grid, level(read(b.add(given.source, b.mul(i, width)))), place)
            for j, row in enumerate(rows):
                x = _load(b, row, FLOATS, b.mul(i, _long(4 * LANES)))
                sums[j].add(own, value, x)
                if shifts:
                    shifts[j].add(own, _constant(1.0, FLOATS), x)

        if kind.chunks:
            for place in range(kind.chunks):
                one(_long(place), place)
        else:
            _steps(b, _within(b, given, first, per), together, one)
        for j in range(kind.by):
            totals.add(j, sums[j].total(), grid.scale)
            if shifts:
                totals.add(j, shifts[j].total(), grid.offset)
    return totals.all()


def _multiplied_trits(b: Any, kind: Loop, given: Given) -> list[Any]:
    """As `_multiplied`, of five digits a byte, which start anywhere in it: chunks are single columns here.

    The table has zeros behind the five, so that eight columns of x are read; of a byte that two groups share each takes
    its own digits.
    """
    together = max(1, TRITS_TOGETHER // kind.by)
    ints, flags = (ir.VectorType(element, EIGHT) for element in (INT32, ir.IntType(1)))
    totals, rows, lanes = _Sums(b, kind, kind.by), _rows(b, kind, given), _constant([*range(EIGHT)], ints)
    with _groups(b, given, given.per) as group:
        start = b.mul(group.index, given.per)
        stop = b.add(start, _within(b, given, start, given.per))
        first, last = b.udiv(start, _long(TRITS_A_BYTE)), b.udiv(b.sub(stop, _long(1)), _long(TRITS_A_BYTE))
        sums = [_Sums(b, kind, together) for _ in rows]

        def digits(i: Any) -> Any:
            code = b.zext(_load(b, given.source, BYTE, i), INT64)
            return _load(b, given.table, kind.floats, b.shl(code, _long(5)))

        def add(i: Any, own: int, value: Any) -> None:
            for j, row in enumerate(rows):
                sums[j].add(own, value, _load(b, row, kind.floats, b.mul(i, _long(4 * TRITS_A_BYTE))))

        def shared(i: Any, counts: Any) -> None:
            column = b.add(_splat(b, b.trunc(b.mul(i, _long(TRITS_A_BYTE)), INT32), ints), lanes)
            low, high = (_splat(b, b.trunc(end, INT32), ints) for end in (start, stop))
            inside = b.and_(b.icmp_signed(">=", column, low), b.icmp_signed("<", column, high))
            add(i, 0, b.select(b.and_(inside, counts), digits(i), _constant(0.0, kind.floats)))

        def one(step: Any, place: int) -> None:
            i = b.add(first, b.add(step, _long(1)))
            add(i, place, digits(i))

        several = b.icmp_signed(">", last, first)
        shared(first, _constant(1, flags))
        _steps(b, b.select(several, b.sub(b.sub(last, first), _long(1)), _long(0)), together, one)
        shared(last, _splat(b, several, flags))
        grid = _grid(b, kind, given, group.index)
        for j in range(kind.by):
            totals.add(j, sums[j].total(), grid.scale)
    return totals.all()


def _in_pairs(b: Any, kind: Loop, given: Given) -> None:
    """As `_over_codes`, two chunks at a time, of weights that are rounded to bfloat16 like those of a dense matrix."""
    weights = _pairs(b, kind, given)
    together = max(1, CHAINS // kind.by) if kind.by else 1
    per, groups = (_long(kind.chunks), max(1, together // kind.chunks)) if kind.chunks else (given.per, 1)
    sums, rows = [_Sums(b, kind, together) for _ in range(kind.by)], _rows(b, kind, given)

    def one_group(g: Any, number: int) -> None:
        first = b.mul(g, per)
        pair = weights(g, first)

        def one(chunk: Any, place: int) -> None:
            value, at = pair(chunk), b.mul(b.add(first, chunk), _long(4 * LANES))
            if not kind.by:
                _store(b, value, given.target, at)
            for j, row in enumerate(rows):
                sums[j].add(place % together, value, _load(b, row, PAIRS, at))

        if kind.chunks:
            for place in range(kind.chunks):
                one(_long(place), number * kind.chunks + place)
        else:
            _steps(b, _within(b, given, first, per), together, one)

    _steps(b, b.udiv(b.add(given.chunks, b.sub(per, _long(1))), per), groups, one_group)
    for j in range(kind.by):
        at, total = b.add(given.target, _long(4 * j)), _sum(b, sums[j].total())
        total = b.fmul(total, _load(b, given.outer, FLOAT32)) if kind.outer_late else total
        _store(b, b.fadd(_load(b, at, FLOAT32), total), at)


def _pairs(b: Any, kind: Loop, given: Given) -> Callable[[Any, Any], Callable[[Any], Any]]:
    """A function of a group, or of two, and its first pair of chunks, that gives one of a pair counted from there."""

    def grids(g: Any) -> list[Grid]:
        numbers = [g, g] if kind.pairs == 1 else [b.mul(g, _long(2)), b.add(b.mul(g, _long(2)), _long(1))]
        return [_grid(b, kind, given, number) for number in numbers]

    small = not kind.halved and kind.bits <= (4 if kind.pairs == 2 else 6)
    if small or (kind.long and _has_sign(kind)):
        return _by_tables(b, kind, given, grids)
    if kind.powers and (kind.bits <= 6 or _has_sign(kind)):
        return _by_exponents(b, kind, given, grids)
    return _by_computing(b, kind, given, grids)


def _by_tables(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Weights of all codes are made once for a group."""
    levels = _all_levels(b, kind, given.table)[: 128 // LANES]
    reading = _reading_trits(b, kind, given) if kind.way == TRITS else _reading_places(b, kind, given, kind.pairs == 2)

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        own, places = grids(g), reading(first)
        if len(levels) == 1:
            tables = [_joined(b, *(_rounded(b, _scaled(b, grid, levels[0])) for grid in own))]
        else:
            tables = _tables(b, [_scaled(b, own[0], level) for level in levels])
        return lambda chunk: b.bitcast(_found(b, tables, places(chunk)), PAIRS)

    return of_group


def _by_exponents(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Levels of a table, to whose exponents that of the scale is added; a half takes one off."""
    levels = _all_levels(b, kind, given.table)[: 128 // LANES]
    tables = _tables(b, levels if len(levels) > 1 else levels * 2)
    reading = _reading_places(b, kind, given, False)
    size, sign, one = (_constant(number, PLACES) for number in (0x7FFF, -0x8000, 1 << BF16_MANTISSA))

    def exponent(grid: Grid) -> Any:
        bits = b.bitcast(b.extract_element(grid.scale, ir.Constant(INT32, 0)), INT32)
        above = b.sub(b.trunc(b.lshr(bits, ir.Constant(INT32, 16)), INT16), ir.Constant(INT16, 127 << BF16_MANTISSA))
        return _splat(b, above, SHORTS)

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        more, places = _joined(b, *(exponent(grid) for grid in grids(g))), reading(first)
        if kind.halved:
            bits = _splat(b, _load(b, given.micro, INT16, b.mul(g, _long(2))), PLACES)
            own = _constant([1 << lane // 2 if lane < 30 else -(2**15) for lane in range(2 * LANES)], PLACES)
            halves = b.icmp_signed("!=", b.and_(bits, own), _constant(0, PLACES))
            more = b.select(halves, b.sub(more, one), more)

        def pair(chunk: Any) -> Any:
            level = _found(b, tables, places(chunk))
            exact = b.add(b.and_(level, size), more)
            normal = b.icmp_signed(">=", exact, one)  # what is less than that products take for zero
            normal = b.and_(normal, b.icmp_signed("!=", b.and_(level, size), _constant(0, PLACES)))
            exact = b.or_(b.select(normal, exact, _constant(0, PLACES)), b.and_(level, sign))
            return b.bitcast(exact, PAIRS)

        return pair

    return of_group


def _by_computing(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Each code is computed in float32, and rounded."""
    read, level, width = _reading(b, kind), LEVELS[kind.way](b, kind, given.table), kind.bits * LANES // 8

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        own = grids(g)

        def pair(chunk: Any) -> Any:
            at = b.add(given.source, b.mul(b.add(first, chunk), _long(2 * width)))
            levels = [level(read(b.add(at, _long(half * width)))) for half in (0, 1)]
            return _joined(b, *(_rounded(b, _scaled(b, *each)) for each in zip(own, levels, strict=True)))

        return lambda chunk: b.bitcast(pair(chunk), PAIRS)

    return of_group


def _has_sign(kind: Loop) -> bool:
    """Whether codes are a sign and seven bits of a size, for which a table of sizes is enough."""
    return kind.way == FLOAT and kind.sign == 128 and not kind.zero and not kind.offset


def _tables(b: Any, levels: list[Any]) -> list[Any]:
    """In bfloat16, 2 * LANES levels each."""
    rounded = [_rounded(b, level) for level in levels]
    return [_joined(b, *rounded[first : first + 2]) for first in range(0, len(rounded), 2)]


def _found(b: Any, tables: list[Any], places: Any) -> Any:
    """What tables hold for codes, above whose bits, or 8 bits of a sign and a size, are others."""
    if len(tables) <= 2:
        return _permuted(b, tables, places)
    low, high = (_permuted(b, tables[first : first + 2], places) for first in (0, 2))
    upper = b.icmp_signed("!=", b.and_(places, _constant(64, PLACES)), _constant(0, PLACES))
    sign = b.and_(b.shl(places, _constant(8, PLACES)), _constant(-0x8000, PLACES))
    return b.xor(b.select(upper, high, low), sign)  # scales may have one too


def _reading_places(b: Any, kind: Loop, given: Given, apart: bool) -> Callable[[Any], Callable[[Any], Any]]:
    """A function of the first pair of chunks of a group that reads codes into lanes of 16 bits, of a pair from there.

    Above a code are bits of others; `apart`: but one that says to which of two groups it belongs.
    """
    size = 16 if kind.bits <= 4 else 32
    starts = [divmod(kind.bits * lane, 8) for lane in range(2 * LANES)]
    pairs = [min(place + j, size - 1) for place, _ in starts for j in (0, 1)]
    shift = _constant([late for _, late in starts], PLACES)

    def read(first: Any, chunk: Any) -> Any:
        at = b.add(given.source, b.mul(b.add(first, chunk), _long(kind.bits * LANES // 4)))
        loaded = _load(b, at, ir.VectorType(BYTE, size))
        places = b.lshr(b.bitcast(_shuffle(b, loaded, loaded, pairs), PLACES), shift)
        if apart:
            upper = _constant([0] * LANES + [LANES] * LANES, PLACES)
            places = b.or_(b.and_(places, _constant(LANES - 1, PLACES)), upper)
        return places

    return lambda first: partial(read, first)


def _reading_trits(b: Any, kind: Loop, given: Given) -> Callable[[Any], Callable[[Any], Any]]:
    """The same of five digits a byte, for a row from a whole byte on.

    Digit d of a byte is the whole part of three times the fraction of byte / 3**(d + 1), which 16 bits are enough for.
    """
    phases = TRITS_A_BYTE + max(1, kind.chunks) - 1  # every fifth pair of chunks begins on a whole byte, as the first
    columns = np.arange(2 * LANES * phases).reshape(phases, 2 * LANES)
    places, digits = np.divmod(columns, TRITS_A_BYTE)
    rows = {"places": places - places[:, :1], "factors": -(-(2**16) // 3 ** (digits + 1))}
    kept = {
        name: cgutils.global_constant(
            b, name, ir.Constant(ir.ArrayType(PLACES, phases), [_constant(row, PLACES) for row in table.tolist()])
        )
        for name, table in rows.items()
    }
    wide, within = ir.VectorType(INT32, 2 * LANES), ir.VectorType(INT16, LANES)

    def phase(i: Any) -> tuple[Any, Any]:
        """Where the last pair of chunks that begins on a whole byte lies, and how many come before this one."""
        fives = b.lshr(b.mul(i, _long(52429)), _long(18))  # i / 5, up to 2**16
        return b.add(given.source, b.shl(fives, _long(5))), b.sub(i, b.mul(fives, _long(5)))

    def read(at: Any, past: Any) -> Any:
        whole = b.lshr(b.mul(past, _long(205)), _long(5))  # bytes of so many pairs
        loaded = b.zext(_load(b, at, ir.VectorType(BYTE, LANES), whole), within)
        own = {name: b.load(b.gep(table, [_long(0), past])) for name, table in kept.items()}
        codes = _permuted(b, [_joined(b, loaded, loaded)], own["places"])
        thirds = b.mul(b.zext(b.mul(codes, own["factors"]), wide), _constant(3, wide))
        return b.trunc(b.lshr(thirds, _constant(16, wide)), PLACES)

    def reading(first: Any) -> Callable[[Any], Any]:
        if kind.chunks:
            at, past = phase(first)
            return lambda chunk: read(at, b.add(past, chunk))
        return lambda chunk: read(*phase(b.add(first, chunk)))

    return reading


def _permuted(b: Any, tables: list[Any], places: Any) -> Any:
    """What one or two tables of 2 * LANES hold at the places, whose upper bits do not count."""
    kind = places.type
    name, given = (
        ("permvar", [tables[0], places]) if len(tables) == 1 else ("vpermi2var", [tables[0], places, tables[1]])
    )
    function = ir.FunctionType(kind, [kind] * len(given))
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.x86.avx512.{name}.hi.512"), given)


def _joined(b: Any, x: Any, y: Any) -> Any:
    return _shuffle(b, x, y, [*range(2 * LANES)])


def _rows(b: Any, kind: Loop, given: Given) -> list[Any]:
    return [b.add(given.x, b.mul(given.x_stride, _long(j))) for j in range(kind.by)]


class _Sums:
    """Vectors of sums, which are zeros each time that the place in the code is passed where they are made."""

    def __init__(self, b: Any, kind: Loop, count: int) -> None:
        self.b, self.places = b, [cgutils.alloca_once(b, kind.floats) for _ in range(count)]
        for place in self.places:
            b.store(_constant(0.0, kind.floats), place)

    def add(self, number: int, x: Any, y: Any) -> None:
        """x * y to one of them."""
        multiplied = _dot if x.type == PAIRS else _fused
        self.b.store(multiplied(self.b, x, y, self.b.load(self.places[number])), self.places[number])

    def all(self) -> list[Any]:
        return [self.b.load(place) for place in self.places]

    def total(self) -> Any:
        return reduce(self.b.fadd, self.all())


def _steps(b: Any, count: Any, together: int, one: Callable[[Any, int], None]) -> None:
    """one(i, its place among those together) for i below count, so many at a time."""
    whole = b.udiv(count, _long(together))
    with cgutils.for_range(b, whole) as step:
        for place in range(together):
            one(b.add(b.mul(step.index, _long(together)), _long(place)), place)
    if together > 1:
        rest = b.mul(whole, _long(together))
        with cgutils.for_range(b, b.sub(count, rest)) as step:
            one(b.add(rest, step.index), 0)


class Grid(NamedTuple):
    """What a group has, in every lane; None: it has none."""

    scale: Any
    zero: Any
    offset: Any
    micro: Any


def _grid(b: Any, kind: Loop, given: Given, g: Any) -> Grid:
    at = b.mul(g, _long(kind.scale_width))
    if kind.scale_width == 4:
        scale = _load(b, given.scale, FLOAT32, at)
    else:
        code = _load(b, given.scale, ir.IntType(8 * kind.scale_width), at)
        scale = _load(b, given.scales, FLOAT32, b.shl(b.zext(code, INT64), _long(2)))
    zero, offset, micro = None, None, None
    if kind.outer and not kind.outer_late:
        scale = b.fmul(scale, _load(b, given.outer, FLOAT32))
    if kind.bare and not kind.late:
        scale = b.fmul(scale, ir.Constant(FLOAT32, 2.0**kind.exponent))
    if kind.zero:
        zero = _splat(b, _load(b, given.zero, FLOAT32, b.mul(g, given.zero_step)))
    if kind.offset:
        offset = _splat(b, _load(b, given.offset, FLOAT32, b.mul(g, given.offset_step)))
    if kind.halved:
        micro = _splat(b, b.zext(_load(b, given.micro, BYTE, g), INT32), INTS)
    return Grid(_splat(b, scale, kind.floats), zero, offset, micro)


def _scaled(b: Any, grid: Grid, value: Any, place: int = 0) -> Any:
    """A chunk of levels, the place-th of a group, as weights."""
    value = b.fmul(_placed(b, grid, value, place), grid.scale)
    return value if grid.offset is None else b.fadd(value, grid.offset)


def _placed(b: Any, grid: Grid, value: Any, place: int) -> Any:
    """A chunk of levels, the place-th of a group, less its zero, or halved."""
    if grid.zero is not None:
        value = b.fsub(value, grid.zero)
    if grid.micro is not None:
        bits = b.shl(grid.micro, _constant([31 - (LANES * place + lane) // 2 for lane in range(LANES)]))
        halves = b.icmp_signed("<", bits, _constant(0))
        value = b.fmul(value, b.select(halves, _constant(0.5, FLOATS), _constant(1.0, FLOATS)))
    return value


@_written
def call(b: Any, address: Any, *given: Any) -> None:
    """(address of a loop, *Given)"""
    place = cgutils.alloca_once(b, INT64, len(given))
    for i, number in enumerate(given):
        b.store(number, b.gep(place, [ir.Constant(INT32, i)]))
    function = ir.FunctionType(ir.VoidType(), [INT64]).as_pointer()
    b.call(b.inttoptr(address, function), [b.ptrtoint(place, INT64)])


def _products(kind: Any, by: int) -> Any:
    multiplied = _fused if kind is FLOATS else _dot

    @_written
    def run(b: Any, tile: Any, tile_stride: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, chunks: Any) -> None:
        """(address and bytes from row to row of: TOGETHER rows of the weight, `by` rows of x, products; chunks)

        Products are added to what is there. Each is the sum of the same LANES sums whatever `by` is.
        """
        places = [(i, j) for i in range(TOGETHER) for j in range(by)]
        sums = {place: cgutils.alloca_once_value(b, _constant(0.0, FLOATS)) for place in places}
        rows = [b.add(tile, b.mul(tile_stride, _long(i))) for i in range(TOGETHER)]
        others = [b.add(x, b.mul(x_stride, _long(j))) for j in range(by)]
        with cgutils.for_range(b, chunks) as step:
            offset = b.mul(step.index, _long(4 * LANES))
            own, other = ([_load(b, at, kind, offset) for at in addresses] for addresses in (rows, others))
            for i, j in places:
                b.store(multiplied(b, own[i], other[j], b.load(sums[i, j])), sums[i, j])
        for i, j in places:
            at = b.add(y, b.add(b.mul(y_stride, _long(i)), _long(4 * j)))
            _store(b, b.fadd(_load(b, at, FLOAT32), _sum(b, b.load(sums[i, j]))), at)

    return run


def _dot(b: Any, x: Any, y: Any, z: Any) -> Any:
    """z + the products of x and y, bfloat16, by two."""
    if DOTS:
        kind = ir.FunctionType(FLOATS, [FLOATS, PAIRS, PAIRS])
        return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512"), [z, x, y])
    for shift, mask in ((16, -1), (0, -(2**16))):  # every second one, as the upper half of a float32
        upper = [b.and_(b.shl(b.bitcast(vector, INTS), _constant(shift)), _constant(mask)) for vector in (x, y)]
        z = _fused(b, b.bitcast(upper[0], FLOATS), b.bitcast(upper[1], FLOATS), z)
    return z


# Of float32, and of bfloat16, whose chunks have twice as many columns.
by_one, by_two, by_four = (_products(FLOATS, by) for by in (1, 2, 4))
pairs_by_one, pairs_by_two, pairs_by_four = (_products(PAIRS, by) for by in (1, 2, 4))


def _adding(kind: Any) -> Any:
    multiplied = _fused if kind is FLOATS else _dot

    @_written
    def run(b: Any, tile: Any, x: Any, y: Any) -> None:
        """(addresses of a chunk, of one of x, and of the number that the sum of their products is added to)"""
        total = _sum(b, multiplied(b, _load(b, tile, kind), _load(b, x, kind), _constant(0.0, FLOATS)))
        _store(b, b.fadd(_load(b, y, FLOAT32), total), y)

    return run


add_products, add_pairs = _adding(FLOATS), _adding(PAIRS)


@_written
def copy(b: Any, target: Any, source: Any, count: Any) -> None:
    """(to address, from address, bytes)"""
    cgutils.raw_memcpy(b, _at(b, target, BYTE), _at(b, source, BYTE), count, 1)


@_written
def copy_eight(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), eight float32"""
    _store(b, _load(b, source, EIGHT_FLOATS), target)


@_written
def round_chunk(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), LANES float32 to bfloat16"""
    _store(b, _rounded(b, _load(b, source, FLOATS)), target)


def _rounded(b: Any, value: Any) -> Any:
    """To bfloat16, as its bits. The instruction takes what is below 1e-38 for zero, as that of products does."""
    if "+avx512bf16" in FEATURES:
        return b.bitcast(b.fptrunc(value, ir.VectorType(PAIRS.element, LANES)), SHORTS)
    bits = b.bitcast(value, INTS)
    odd = b.and_(b.lshr(bits, _constant(16)), _constant(1))
    rounded = b.add(bits, b.add(odd, _constant(0x7FFF)))
    rounded = b.select(b.fcmp_unordered("uno", value, value), _constant(0x7FC00000), rounded)
    return b.trunc(b.lshr(rounded, _constant(16)), SHORTS)


@_written
def prefetch(b: Any, address: Any, count: Any) -> None:
    """(address of what will be read soon, bytes)"""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT32, INT32, INT32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    lines = b.udiv(b.add(count, _long(LINE - 1)), _long(LINE))
    with cgutils.for_range(b, lines) as line:
        place = _at(b, address, BYTE, b.mul(line.index, _long(LINE)))
        b.call(function, [place, *(ir.Constant(INT32, number) for number in (0, 3, 1))])  # to read, often, as data


def _reader(kind: Any, known: Any) -> Any:
    """A function that numba can call for the number at an address."""

    @intrinsic
    def read(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _load(b, args[0], kind)

        return known(types.intp), generate

    return read


float_at, byte_at = _reader(FLOAT32, types.float32), _reader(BYTE, types.uint8)


@intrinsic
def take(context, address, count):  # type: ignore[no-untyped-def]
    """Add `count` to the number at an address and give what was there: no two threads are given the same."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _at(b, args[0], INT64), args[1], "monotonic")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def pointer_to(context, address):  # type: ignore[no-untyped-def]
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _at(b, args[0], BYTE)

    return types.voidptr(types.intp), generate
