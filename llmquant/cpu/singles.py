"""The loops over codes in float32: one decodes a row of a weight, others multiply it by rows of x as it is decoded."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from llmquant.cpu.codes import (
    LEVELS,
    TRITS_A_BYTE,
    Given,
    Loop,
    add_to_sum,
    each_chunk,
    grid_of,
    groups_of,
    placed,
    reading_of,
    rows_of,
    scaled,
    within,
)
from llmquant.cpu.vectors import (
    BYTE,
    EIGHT,
    FLOAT32,
    FLOATS,
    INT32,
    INT64,
    LANES,
    Sums,
    constant,
    load,
    long,
    rounded,
    splat,
    steps,
    store,
    sum_of,
)
from llmquant_kernels.cpu_compiled import TRITS

# Of a group of so many chunks of LANES columns, side by side: no addition waits for the last one.
SUMS = {1: 1, 2: 1, 4: 1, 8: 2, 16: 4, 0: 4}
TRITS_TOGETHER = 3


def in_singles(b: Any, kind: Loop, given: Given) -> None:
    """Write ``(level - zero) * scale * half + offset`` to target, or add to it the sums of these times rows of x."""
    if not kind.by:
        return _decoded(b, kind, given)
    for j, eight in enumerate(_multiplied_trits(b, kind, given) if kind.way == TRITS else _multiplied(b, kind, given)):
        total = sum_of(b, eight)
        if kind.late:
            total = b.fmul(total, ir.Constant(FLOAT32, 2.0**kind.exponent))
        add_to_sum(b, kind, given, j, total)


def _groups(b: Any, given: Given, per: Any) -> Any:
    return cgutils.for_range(b, groups_of(b, given, per))


def _decoded(b: Any, kind: Loop, given: Given) -> None:
    read, level = reading_of(b, kind), LEVELS[kind.way](b, kind, given.table)
    width = long(4 * LANES if kind.way == TRITS else kind.bits * LANES // 8)
    per = long(kind.chunks) if kind.chunks else given.per
    with _groups(b, given, per) as group:
        first, grid = b.mul(group.index, per), grid_of(b, kind, given, group.index)

        def one(chunk: Any, place: int) -> None:
            i = b.add(first, chunk)
            value = scaled(b, grid, level(read(b.add(given.source, b.mul(i, width)))), place)
            value = value if kind.size == 4 else rounded(b, value)
            store(b, value, given.target, b.mul(i, long(kind.size * LANES)))

        each_chunk(b, kind, given, first, 1, one)


def _multiplied(b: Any, kind: Loop, given: Given) -> list[Any]:
    """For each row of x a vector of sums of levels times x. Those of a group are added up, and then take its scale."""
    read, level = reading_of(b, kind), LEVELS[kind.way](b, kind, given.table)
    per, together = (long(kind.chunks) if kind.chunks else given.per, max(1, SUMS[kind.chunks] // kind.by))
    totals, rows = Sums(b, kind.by, kind.floats), rows_of(b, kind, given)
    width = long(kind.bits * LANES // 8)
    with _groups(b, given, per) as group:
        first, grid = b.mul(group.index, per), grid_of(b, kind, given, group.index)
        sums = [Sums(b, together, kind.floats) for _ in rows]
        shifts = [Sums(b, together, kind.floats) for _ in rows] if kind.offset else []

        def one(chunk: Any, place: int) -> None:
            i, own = b.add(first, chunk), place % together
            value = placed(b, grid, level(read(b.add(given.source, b.mul(i, width)))), place)
            for j, row in enumerate(rows):
                x = load(b, row, FLOATS, b.mul(i, long(4 * LANES)))
                sums[j].add(own, value, x)
                if shifts:
                    shifts[j].add(own, constant(1.0, FLOATS), x)

        each_chunk(b, kind, given, first, together, one)
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
    totals, rows, lanes = Sums(b, kind.by, kind.floats), rows_of(b, kind, given), constant([*range(EIGHT)], ints)
    with _groups(b, given, given.per) as group:
        start = b.mul(group.index, given.per)
        stop = b.add(start, within(b, given, start, given.per))
        first, last = b.udiv(start, long(TRITS_A_BYTE)), b.udiv(b.sub(stop, long(1)), long(TRITS_A_BYTE))
        sums = [Sums(b, together, kind.floats) for _ in rows]

        def digits(i: Any) -> Any:
            code = b.zext(load(b, given.source, BYTE, i), INT64)
            return load(b, given.table, kind.floats, b.shl(code, long(5)))

        def add(i: Any, own: int, value: Any) -> None:
            for j, row in enumerate(rows):
                sums[j].add(own, value, load(b, row, kind.floats, b.mul(i, long(4 * TRITS_A_BYTE))))

        def shared(i: Any, counts: Any) -> None:
            column = b.add(splat(b, b.trunc(b.mul(i, long(TRITS_A_BYTE)), INT32), ints), lanes)
            low, high = (splat(b, b.trunc(end, INT32), ints) for end in (start, stop))
            inside = b.and_(b.icmp_signed(">=", column, low), b.icmp_signed("<", column, high))
            add(i, 0, b.select(b.and_(inside, counts), digits(i), constant(0.0, kind.floats)))

        def one(step: Any, place: int) -> None:
            i = b.add(first, b.add(step, long(1)))
            add(i, place, digits(i))

        several = b.icmp_signed(">", last, first)
        shared(first, constant(1, flags))
        steps(b, b.select(several, b.sub(b.sub(last, first), long(1)), long(0)), together, one)
        shared(last, splat(b, several, flags))
        grid = grid_of(b, kind, given, group.index)
        for j in range(kind.by):
            totals.add(j, sums[j].total(), grid.scale)
    return totals.all()
