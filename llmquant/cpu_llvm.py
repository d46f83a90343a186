"""The loops over the codes of a weight on a CPU, written in LLVM's language and compiled by numba for one format each.

Eight codes at a time are cut out of the stream of bits, become levels in one of three ways and take the scale of their
group. They are written as vectors of eight, since compilers do not find by themselves that two instructions of AVX2
look up eight numbers in a table of sixteen. It is plain LLVM, for any processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from llmquant_kernels.cpu_compiled import FLOAT, INTEGER, TABLE, TRITS

LANES = 8
TOGETHER = 4  # rows of the weight that share what is loaded of x
PAIR = 2  # rows of x that share what is loaded of the weight
SUMS = 4  # of a dot product, side by side: no addition waits for the last one

BYTE, INT16, INT32, INT64, FLOAT32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
BYTES, SHORTS, INTS, FLOATS = (ir.VectorType(kind, LANES) for kind in (BYTE, INT16, INT32, FLOAT32))


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
    chunks: int = 0  # of eight columns in a group; 0 where that is told when it is called
    outer: bool = False  # scales have a scale
    halved: bool = False  # by micro-exponents
    moved: bool = False  # by zeros and offsets
    sums: int = 0  # where it multiplies by x: partial sums


class Given(NamedTuple):
    """What a loop is called with: addresses, and numbers of 64 bits."""

    source: Any
    target: Any  # of the numbers that are decoded, or of the one that the sum is added to
    x: Any
    table: Any
    scale: Any
    scales: Any  # what scales of 8 and 16 bits stand for
    outer: Any
    zero: Any
    zero_step: Any  # bytes from group to group
    offset: Any
    offset_step: Any
    micro: Any
    chunks: Any  # of eight columns
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
    return ir.Constant(kind, numbers if isinstance(numbers, list) else [numbers] * LANES)


def _splat(b: Any, number: Any, kind: Any = FLOATS) -> Any:
    first = b.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
    return b.shuffle_vector(first, first, _constant(0))


def _each(b: Any, kind: Any, lane: Callable[[Any], Any]) -> Any:
    """The vector of lane(0), lane(1), .., each called with the lane's number as LLVM has it."""
    vector = ir.Constant(kind, ir.Undefined)
    for i in range(LANES):
        place = ir.Constant(INT32, i)
        vector = b.insert_element(vector, lane(place), place)
    return vector


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the processor can."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _sum(b: Any, eight: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        halves = (ir.Constant(ir.VectorType(INT32, width), [*range(first, first + width)]) for first in (0, width))
        low, high = (b.shuffle_vector(eight, eight, half) for half in halves)
        eight = b.fadd(low, high)
    return b.extract_element(eight, ir.Constant(INT32, 0))


# ---- where codes come from: a function of an address that gives eight, each in the upper bits of its lane


def _reading(b: Any, kind: Loop) -> Callable[[Any], Any]:
    bits = kind.bits
    if kind.way == TRITS:  # levels, which lie there already
        return lambda at: _load(b, at, FLOATS)
    if bits <= 4:  # in one word, which goes to every lane of 32 bits
        shift = _constant([32 - bits * (lane + 1) for lane in range(LANES)])
        return lambda at: b.shl(_splat(b, _load(b, at, INT32), INTS), shift)
    # Each lies in two bytes, which go to a lane of 16 bits.
    starts = [divmod(bits * lane, 8) for lane in range(LANES)]
    places = [place + i for place, _ in starts for i in (0, 1)]
    pairs = ir.Constant(ir.VectorType(INT32, 2 * LANES), [min(place, 7) for place in places])
    shift = _constant([16 - bits - late for _, late in starts], SHORTS)

    def read(at: Any) -> Any:
        eight = _load(b, at, BYTES)
        if bits == 8:
            return b.shl(b.zext(eight, SHORTS), shift)
        return b.shl(b.bitcast(b.shuffle_vector(eight, eight, pairs), SHORTS), shift)

    return read


# ---- what codes become: a function of what the former gives, eight levels, float32


def _from_table(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Of up to sixteen levels, eight in each of two registers; of more, one by one."""
    halves = [_load(b, table, FLOATS, _long(offset)) for offset in (0, 32)]

    def element(half: Any, places: Any, lane: Any) -> Any:
        return b.extract_element(half, b.extract_element(places, lane))

    def of_eight(codes: Any) -> Any:
        return _each(b, FLOATS, partial(element, halves[0], b.lshr(codes, _constant(32 - kind.bits))))

    def of_sixteen(codes: Any) -> Any:
        places = b.and_(b.lshr(codes, _constant(28)), _constant(7))
        first, second = (_each(b, FLOATS, partial(element, half, places)) for half in halves)
        return b.select(b.icmp_signed("<", codes, _constant(0)), second, first)

    def of_many(codes: Any) -> Any:
        places = b.lshr(codes, _constant(16 - kind.bits, SHORTS))

        def lane(i: Any) -> Any:
            return _load(b, table, FLOAT32, b.shl(b.zext(b.extract_element(places, i), INT64), _long(2)))

        return _each(b, FLOATS, lane)

    return of_eight if kind.bits < 4 else of_sixteen if kind.bits == 4 else of_many


def _as_integer(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """With the bit of the sign turned over codes count from the least."""
    down = 16 - kind.bits

    def level(codes: Any) -> Any:
        codes = b.xor(codes, _constant(kind.sign << down, SHORTS)) if kind.sign else codes
        size = b.zext(b.lshr(codes, _constant(down, SHORTS)), INTS)
        return b.sitofp(b.sub(size, _constant(kind.least)), FLOATS)

    return level


def _as_float(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    """Sign | exponent | mantissa, as the upper bits of half precision, which processors convert, subnormal or not."""
    exponents, down, greatest = (kind.bits - 1 - kind.mantissa, 10 - kind.mantissa, kind.sign - 1)

    def level(codes: Any) -> Any:
        upper = b.ashr(codes, _constant(5 - exponents, SHORTS))
        value = b.and_(upper, _constant(greatest << down | -(2**15), SHORTS))
        if kind.largest < greatest:
            size = b.and_(upper, _constant(greatest << down, SHORTS))
            beyond = b.icmp_signed(">", size, _constant(kind.largest << down, SHORTS))
            value = b.or_(value, b.sext(beyond, SHORTS))  # all bits: NaN
        value = b.fpext(b.bitcast(value, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        if kind.sums and not kind.moved:
            return value  # what the exponent says is left for the sum, and zeros may have a sign
        value = b.fmul(value, _constant(2.0**kind.exponent, FLOATS))
        return b.fadd(value, _constant(0.0, FLOATS)) if kind.least else value

    return level


def _as_it_is(b: Any, kind: Loop, table: Any) -> Callable[[Any], Any]:
    return lambda levels: levels


LEVELS = {TABLE: _from_table, INTEGER: _as_integer, FLOAT: _as_float, TRITS: _as_it_is}


# ---- loops


def _over_codes(b: Any, kind: Loop, given: Given) -> None:
    """Write ``(level - zero) * scale * half + offset`` to target, or add to it the sum of these times x."""
    read, level = _reading(b, kind), LEVELS[kind.way](b, kind, given.table)
    width, per = (_long(32 if kind.way == TRITS else kind.bits), _long(kind.chunks) if kind.chunks else given.per)
    sums = [cgutils.alloca_once_value(b, _constant(0.0, FLOATS)) for _ in range(kind.sums)]
    scale_of, change = _grids(b, kind, given)
    with cgutils.for_range(b, b.udiv(b.add(given.chunks, b.sub(per, _long(1))), per)) as group:
        first, grid = b.mul(group.index, per), scale_of(group.index)

        def one(chunk: Any, place: int) -> None:
            i = b.add(first, chunk)
            value = change(level(read(b.add(given.source, b.mul(i, width)))), place, *grid)
            if sums:
                total, other = (sums[place % len(sums)], _load(b, given.x, FLOATS, b.shl(i, _long(5))))
                b.store(_fused(b, value, other, b.load(total)), total)
            else:
                _store(b, value, given.target, b.shl(i, _long(5)))

        if kind.chunks:
            for place in range(kind.chunks):
                one(_long(place), place)
        else:
            left = b.sub(given.chunks, first)
            _steps(b, b.select(b.icmp_signed("<", left, per), left, per), max(1, len(sums)), one)
    if sums:
        total = b.load(sums[0])
        for other in sums[1:]:
            total = b.fadd(total, b.load(other))
        total = _sum(b, total)
        if not kind.moved:  # what is the same for the whole row
            total = b.fmul(total, ir.Constant(FLOAT32, 2.0**kind.exponent))
            total = b.fmul(total, _load(b, given.outer, FLOAT32)) if kind.outer else total
        _store(b, b.fadd(_load(b, given.target, FLOAT32), total), given.target)


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


def _grids(b: Any, kind: Loop, given: Given) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What a group has, as a function of its number; and levels changed by that: a function of these, the place of the
    eight in the group, and what the former gives."""
    outer = _load(b, given.outer, FLOAT32) if kind.outer and (kind.moved or not kind.sums) else None

    def of_group(g: Any) -> list[Any]:
        at = b.mul(g, _long(kind.scale_width))
        if kind.scale_width == 4:
            scale = _load(b, given.scale, FLOAT32, at)
        else:
            code = _load(b, given.scale, ir.IntType(8 * kind.scale_width), at)
            scale = _load(b, given.scales, FLOAT32, b.shl(b.zext(code, INT64), _long(2)))
        scale = _splat(b, scale if outer is None else b.fmul(scale, outer))
        half, zero, offset, micro = None, None, None, None
        if kind.moved:
            zero = _splat(b, _load(b, given.zero, FLOAT32, b.mul(g, given.zero_step)))
            offset = _splat(b, _load(b, given.offset, FLOAT32, b.mul(g, given.offset_step)))
        if kind.halved:
            micro = _splat(b, b.zext(_load(b, given.micro, BYTE, g), INT32), INTS)
            half = b.fmul(scale, _constant(0.5, FLOATS))
        return [scale, half, zero, offset, micro]

    def change(value: Any, place: int, scale: Any, half: Any, zero: Any, offset: Any, micro: Any) -> Any:
        if kind.halved:
            bits = b.shl(micro, _constant([31 - 4 * place - lane // 2 for lane in range(LANES)]))
            scale = b.select(b.icmp_signed("<", bits, _constant(0)), half, scale)
        value = b.fmul(b.fsub(value, zero) if kind.moved else value, scale)
        return b.fadd(value, offset) if kind.moved else value

    return of_group, change


@_written
def call(b: Any, address: Any, *given: Any) -> None:
    """(address of a loop, *Given)"""
    place = cgutils.alloca_once(b, INT64, len(given))
    for i, number in enumerate(given):
        b.store(number, b.gep(place, [ir.Constant(INT32, i)]))
    function = ir.FunctionType(ir.VoidType(), [INT64]).as_pointer()
    b.call(b.inttoptr(address, function), [b.ptrtoint(place, INT64)])


def _products(pair: int) -> Any:
    @_written
    def run(b: Any, tile: Any, tile_stride: Any, x: Any, x_stride: Any, y: Any, y_stride: Any, chunks: Any) -> None:
        """(address and bytes from row to row of: TOGETHER rows of the weight, `pair` rows of x, products; chunks)

        Products are added to what is there. Each is the sum of the same eight sums whatever `pair` is.
        """
        places = [(i, j) for i in range(TOGETHER) for j in range(pair)]
        sums = {place: cgutils.alloca_once_value(b, _constant(0.0, FLOATS)) for place in places}
        rows = [b.add(tile, b.mul(tile_stride, _long(i))) for i in range(TOGETHER)]
        others = [b.add(x, b.mul(x_stride, _long(j))) for j in range(pair)]
        with cgutils.for_range(b, chunks) as step:
            offset = b.shl(step.index, _long(5))
            own, other = ([_load(b, at, FLOATS, offset) for at in addresses] for addresses in (rows, others))
            for i, j in places:
                b.store(_fused(b, own[i], other[j], b.load(sums[i, j])), sums[i, j])
        for i, j in places:
            at = b.add(y, b.add(b.mul(y_stride, _long(i)), _long(4 * j)))
            _store(b, b.fadd(_load(b, at, FLOAT32), _sum(b, b.load(sums[i, j]))), at)

    return run


products_of_one, products_of_pair = _products(1), _products(PAIR)


@_written
def add_products(b: Any, tile: Any, x: Any, y: Any) -> None:
    """(addresses of eight numbers, of eight others, and of the number that the sum of their products is added to)"""
    total = _sum(b, b.fmul(_load(b, tile, FLOATS), _load(b, x, FLOATS)))
    _store(b, b.fadd(_load(b, y, FLOAT32), total), y)


@_written
def copy(b: Any, target: Any, source: Any, count: Any) -> None:
    """(to address, from address, bytes)"""
    cgutils.raw_memcpy(b, _at(b, target, BYTE), _at(b, source, BYTE), count, 1)


@_written
def copy_eight(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), eight float32"""
    _store(b, _load(b, source, FLOATS), target)


@_written
def round_eight(b: Any, target: Any, source: Any) -> None:
    """(to address, from address), eight float32 to bfloat16"""
    value = _load(b, source, FLOATS)
    bits = b.bitcast(value, INTS)
    odd = b.and_(b.lshr(bits, _constant(16)), _constant(1))
    rounded = b.add(bits, b.add(odd, _constant(0x7FFF)))
    rounded = b.select(b.fcmp_unordered("uno", value, value), _constant(0x7FC00000), rounded)
    _store(b, b.trunc(b.lshr(rounded, _constant(16)), SHORTS), target)


def _reader(kind: Any, known: Any) -> Any:
    """A function that numba can call for the number at an address."""

    @intrinsic
    def read(context: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            return _load(b, args[0], kind)

        return known(types.intp), generate

    return read


float_at, byte_at = _reader(FLOAT32, types.float32), _reader(BYTE, types.uint8)
