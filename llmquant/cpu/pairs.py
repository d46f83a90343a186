"""The loops over codes in bfloat16, for processors that multiply it by pairs (AVX-512 with BF16): see DOTS.

Two chunks at a time become bfloat16, as those of a dense weight, in one of three ways. Where codes are few, or groups
long, the weights of all codes of a group are made once, and looked up. Where scales are powers of two, levels are
looked up, and exponents added to theirs. All else is computed in float32, and rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from llmquant.cpu.codes import (
    LEVELS,
    TRITS_A_BYTE,
    Given,
    Grid,
    Loop,
    add_to_sum,
    all_levels,
    each_chunk,
    grid_of,
    groups_of,
    reading_of,
    rows_of,
    scaled,
)
from llmquant.cpu.vectors import (
    BYTE,
    INT16,
    INT32,
    LANES,
    PAIRS,
    PLACES,
    SHORTS,
    Sums,
    constant,
    joined,
    load,
    long,
    rounded,
    shuffle,
    splat,
    steps,
    store,
    sum_of,
)
from llmquant_kernels.cpu_compiled import TRITS

CHAINS = 8  # sums of products of pairs side by side: an addition takes so many cycles, or less
BF16_MANTISSA = 7


def in_pairs(b: Any, kind: Loop, given: Given) -> None:
    """As `in_singles`, two chunks at a time, of weights that are rounded to bfloat16 like those of a dense matrix."""
    weights = _pairs(b, kind, given)
    together = max(1, CHAINS // kind.by) if kind.by else 1
    per, groups = (long(kind.chunks), max(1, together // kind.chunks)) if kind.chunks else (given.per, 1)
    sums, rows = [Sums(b, together, kind.floats) for _ in range(kind.by)], rows_of(b, kind, given)

    def one_group(g: Any, number: int) -> None:
        first = b.mul(g, per)
        pair = weights(g, first)

        def one(chunk: Any, place: int) -> None:
            place += number * kind.chunks
            value, at = pair(chunk), b.mul(b.add(first, chunk), long(4 * LANES))
            if not kind.by:
                store(b, value, given.target, at)
            for j, row in enumerate(rows):
                sums[j].add(place % together, value, load(b, row, PAIRS, at))

        each_chunk(b, kind, given, first, together, one)

    steps(b, groups_of(b, given, per), groups, one_group)
    for j in range(kind.by):
        add_to_sum(b, kind, given, j, sum_of(b, sums[j].total()))


def _pairs(b: Any, kind: Loop, given: Given) -> Callable[[Any, Any], Callable[[Any], Any]]:
    """A function of a group, or of two, and its first pair of chunks, that gives one of a pair counted from there."""

    def grids(g: Any) -> list[Grid]:
        numbers = [g, g] if kind.pairs == 1 else [b.mul(g, long(2)), b.add(b.mul(g, long(2)), long(1))]
        return [grid_of(b, kind, given, number) for number in numbers]

    if kind.powers:
        return _by_exponents(b, kind, given, grids)
    small = not kind.halved and kind.bits <= (4 if kind.pairs == 2 else 6)
    if small or (kind.long and kind.has_sign):
        return _by_tables(b, kind, given, grids)
    return _by_computing(b, kind, given, grids)


def _by_tables(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Weights of all codes are made once for a group."""
    levels = all_levels(b, kind, given.table)[: 128 // LANES]
    reading = _reading_trits(b, kind, given) if kind.way == TRITS else _reading_places(b, kind, given)

    def found(tables: list[Any], places: Any) -> Any:
        if kind.pairs == 2:  # the second group has the upper half of the table
            upper = constant([0] * LANES + [LANES] * LANES, PLACES)
            places = b.or_(b.and_(places, constant(LANES - 1, PLACES)), upper)
        return b.bitcast(_found(b, tables, places), PAIRS)

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        own, places = grids(g), reading(first)
        if len(levels) == 1:
            tables = [joined(b, *(rounded(b, scaled(b, grid, levels[0])) for grid in own))]
        else:
            tables = _tables(b, [scaled(b, own[0], level) for level in levels])
        return lambda chunk: found(tables, places(chunk))

    return of_group


def _by_exponents(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Levels of a table, to whose exponents that of the scale is added; a half takes one off."""
    levels = all_levels(b, kind, given.table)[: 128 // LANES]
    tables = _tables(b, levels if len(levels) > 1 else levels * 2)
    reading = _reading_places(b, kind, given)
    size, sign, one = (constant(number, PLACES) for number in (0x7FFF, -0x8000, 1 << BF16_MANTISSA))

    def exponent(grid: Grid) -> Any:
        bits = b.bitcast(b.extract_element(grid.scale, ir.Constant(INT32, 0)), INT32)
        above = b.sub(b.trunc(b.lshr(bits, ir.Constant(INT32, 16)), INT16), ir.Constant(INT16, 127 << BF16_MANTISSA))
        return splat(b, above, SHORTS)

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        more, places = joined(b, *(exponent(grid) for grid in grids(g))), reading(first)
        if kind.halved:
            bits = splat(b, load(b, given.micro, INT16, b.mul(g, long(2))), PLACES)
            own = constant([1 << lane // 2 if lane < 30 else -(2**15) for lane in range(2 * LANES)], PLACES)
            halves = b.icmp_signed("!=", b.and_(bits, own), constant(0, PLACES))
            more = b.select(halves, b.sub(more, one), more)

        def pair(chunk: Any) -> Any:
            level = _found(b, tables, places(chunk))
            exact = b.add(b.and_(level, size), more)
            normal = b.icmp_signed(">=", exact, one)  # what is less than that products take for zero
            normal = b.and_(normal, b.icmp_signed("!=", b.and_(level, size), constant(0, PLACES)))
            exact = b.or_(b.select(normal, exact, constant(0, PLACES)), b.and_(level, sign))
            return b.bitcast(exact, PAIRS)

        return pair

    return of_group


def _by_computing(b: Any, kind: Loop, given: Given, grids: Callable[[Any], list[Grid]]) -> Any:
    """Each code is computed in float32, and rounded."""
    read, level, width = reading_of(b, kind), LEVELS[kind.way](b, kind, given.table), kind.bits * LANES // 8

    def of_group(g: Any, first: Any) -> Callable[[Any], Any]:
        own = grids(g)

        def pair(chunk: Any) -> Any:
            at = b.add(given.source, b.mul(b.add(first, chunk), long(2 * width)))
            levels = [level(read(b.add(at, long(half * width)))) for half in (0, 1)]
            return joined(b, *(rounded(b, scaled(b, *each)) for each in zip(own, levels, strict=True)))

        return lambda chunk: b.bitcast(pair(chunk), PAIRS)

    return of_group


def _tables(b: Any, levels: list[Any]) -> list[Any]:
    """In bfloat16, 2 * LANES levels each."""
    own = [rounded(b, level) for level in levels]
    return [joined(b, *own[first : first + 2]) for first in range(0, len(own), 2)]


def _found(b: Any, tables: list[Any], places: Any) -> Any:
    """What tables hold for codes, above whose bits, or 8 bits of a sign and a size, are others."""
    if len(tables) <= 2:
        return _permuted(b, tables, places)
    low, high = (_permuted(b, tables[first : first + 2], places) for first in (0, 2))
    upper = b.icmp_signed("!=", b.and_(places, constant(64, PLACES)), constant(0, PLACES))
    sign = b.and_(b.shl(places, constant(8, PLACES)), constant(-0x8000, PLACES))
    return b.xor(b.select(upper, high, low), sign)  # scales may have one too


def _reading_places(b: Any, kind: Loop, given: Given) -> Callable[[Any], Callable[[Any], Any]]:
    """A function of the first pair of chunks of a group that reads codes into lanes of 16 bits, of a pair from there.

    Above a code are bits of others.
    """
    size = 16 if kind.bits <= 4 else 32
    starts = [divmod(kind.bits * lane, 8) for lane in range(2 * LANES)]
    pairs = [min(place + j, size - 1) for place, _ in starts for j in (0, 1)]
    shift = constant([late for _, late in starts], PLACES)

    def read(first: Any, chunk: Any) -> Any:
        at = b.add(given.source, b.mul(b.add(first, chunk), long(kind.bits * LANES // 4)))
        loaded = load(b, at, ir.VectorType(BYTE, size))
        return b.lshr(b.bitcast(shuffle(b, loaded, loaded, pairs), PLACES), shift)

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
            b, name, ir.Constant(ir.ArrayType(PLACES, phases), [constant(row, PLACES) for row in table.tolist()])
        )
        for name, table in rows.items()
    }
    wide, within = ir.VectorType(INT32, 2 * LANES), ir.VectorType(INT16, LANES)

    def phase(i: Any) -> tuple[Any, Any]:
        """Where the last pair of chunks that begins on a whole byte lies, and how many come before this one."""
        fives = b.lshr(b.mul(i, long(52429)), long(18))  # i / 5, up to 2**16
        return b.add(given.source, b.shl(fives, long(5))), b.sub(i, b.mul(fives, long(5)))

    def read(at: Any, past: Any) -> Any:
        whole = b.lshr(b.mul(past, long(205)), long(5))  # bytes of so many pairs
        loaded = b.zext(load(b, at, ir.VectorType(BYTE, LANES), whole), within)
        own = {name: b.load(b.gep(table, [long(0), past])) for name, table in kept.items()}
        codes = _permuted(b, [joined(b, loaded, loaded)], own["places"])
        thirds = b.mul(b.zext(b.mul(codes, own["factors"]), wide), constant(3, wide))
        return b.trunc(b.lshr(thirds, constant(16, wide)), PLACES)

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
