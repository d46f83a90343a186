"""What threads do together with a weight, compiled by numba: decode rows of it, or multiply them by rows of x."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, njit, types

from llmquant.cpu import instructions
from llmquant.cpu.codes import TRITS_A_BYTE
from llmquant.cpu.instructions import LINE, SHARED, TOGETHER, byte_at, call, float_at, pointer_to, take
from llmquant.cpu.loops import kept_on_disk, version
from llmquant.cpu.vectors import EIGHT, LANES

# Columns that are decoded at a time: with those of x they stay in the first cache. A whole number of lanes.
COLUMNS = 1280
ROWS = 64  # of the weight whose products with few rows of x stay there too
AHEAD = 12  # rows of the weight: what is read of one is too little for a processor to see what comes next
FEW = 8  # rows of x up to which the weight is decoded for each eight, or four, or two, or one, of them


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
    neutral: int
    rows: int
    columns: int
    groups: int
    stride: int  # bytes of a row
    spared: int  # the first row in tail
    table_stride: int  # bytes from row to row; 0 where there is one for all
    scale_stride: int
    scale_width: int  # bytes of a scale
    outer_stride: int
    zero_stride: int
    zero_step: int  # bytes from group to group
    offset_stride: int
    offset_step: int
    micro_stride: int
    bits: int
    group: int
    trits: bool
    apart: bool  # groups end within LANES columns: levels are written first, then multiplied by scales
    unrolled: int  # columns that loops multiply by float32 at a time
    unrolled_pairs: int  # by bfloat16
    decoded: int  # columns that are decoded to float32 at a time, 0: a tile
    rounded: int  # to bfloat16
    # Addresses of loops, 0 where there is none, or none yet: what decodes to float32, and to bfloat16,
    decoding: int = 0
    rounding: int = 0
    by_one: int = 0  # what multiplies by so many rows of x, float32,
    by_two: int = 0
    by_four: int = 0
    pairs_by_one: int = 0  # and bfloat16
    pairs_by_two: int = 0
    pairs_by_four: int = 0
    pairs_by_eight: int = 0


class Task(NamedTuple):
    """What threads do together. Each takes `step` rows of the weight, and more until there are none."""

    next: int  # the first row that nobody has taken
    stop: int
    step: int
    weight: int  # address of a Weight
    x: int  # address of what is multiplied, 0 where the weight is decoded
    x_stride: int  # bytes from row to row
    rows: int  # of x
    y: int  # address of what is written
    first: int  # the row of the weight that comes first there
    size: int  # bytes of a number of x, or of what is decoded


WEIGHT, TASK = (np.dtype([(name, np.int64) for name in kind._fields]) for kind in (Weight, Task))
_compiled = partial(njit, error_model="numpy")


@_compiled(inline="always")
def _scale_of(w, r, g):  # type: ignore[no-untyped-def]
    row = w.scale + r * w.scale_stride
    scale = row + 4 * g
    if w.scale_width == 1:
        scale = w.scales + 4 * np.int64(byte_at(row + g))
    if w.scale_width == 2:
        scale = w.scales + 4 * (np.int64(byte_at(row + 2 * g)) | np.int64(byte_at(row + 2 * g + 1)) << 8)
    return float_at(scale) * float_at(w.outer + r * w.outer_stride)


@_compiled(inline="always")
def _end_of_tile(w, first):  # type: ignore[no-untyped-def]
    """Tiles are whole groups where these are small, and parts of one where they are large."""
    if w.apart:
        return min(first + COLUMNS, w.columns)
    if w.group <= COLUMNS:
        return min(first + COLUMNS // w.group * w.group, w.columns)
    return min(first + COLUMNS, (first // w.group + 1) * w.group, w.columns)


@_compiled(inline="always")
def _source_of(w, r, first):  # type: ignore[no-untyped-def]
    row = w.tail + (r - w.spared) * w.stride if r >= w.spared else w.packed + r * w.stride
    return row + (first // TRITS_A_BYTE if w.trits else first // EIGHT * w.bits)


@_compiled(inline="always")
def _run(w, loop, source, r, first, chunks, per, target, x, x_stride):  # type: ignore[no-untyped-def]
    """A loop over `chunks` of row r from column `first` on, `per` of them to a group, whose codes begin at `source`."""
    g = first // w.group
    scale = w.scale + r * w.scale_stride + w.scale_width * g
    outer, table = w.outer + r * w.outer_stride, w.table + r * w.table_stride
    zero, offset = (w.zero + r * w.zero_stride + w.zero_step * g, w.offset + r * w.offset_stride + w.offset_step * g)
    micro = w.micro + r * w.micro_stride + g
    if w.apart and not x:
        scale, per = w.neutral, chunks
    grids = scale, w.scales, outer, zero, w.zero_step, offset, w.offset_step, micro
    call((loop, source, target, x, x_stride, table, *grids, chunks, per))


@_compiled(inline="always")
def _per(w, chunks, width):  # type: ignore[no-untyped-def]
    """How many chunks of so many columns make a group."""
    return chunks if w.groups == 1 else w.group // width


@_compiled(inline="always")
def _address_of(tile):  # type: ignore[no-untyped-def]
    return np.int64(tile.ctypes.data) + 4 * LANES


@_compiled()
def _decode_tile(w, r, first, last, tile):  # type: ignore[no-untyped-def]
    """Columns [first, last) of row r to tile[LANES:], rounded up to whole lanes, with zeros there."""
    target, source, width = _address_of(tile), _source_of(w, r, first), last - first
    chunks = (width + LANES - 1) // LANES
    if w.trits:
        past = first % TRITS_A_BYTE
        for i in range((past + width + TRITS_A_BYTE - 1) // TRITS_A_BYTE):  # of the eight three are overwritten
            place = target + 4 * (TRITS_A_BYTE * i - past)
            instructions.copy_eight((place, w.table + 32 * np.int64(byte_at(source + i))))
        source = target
    if not (w.apart and w.trits):
        _run(w, w.decoding, source, r, first, chunks, _per(w, chunks, LANES), target, 0, 0)
    if w.apart:
        c, g = first, first // w.group
        while c < last:
            scale, zero = (_scale_of(w, r, g), float_at(w.zero + r * w.zero_stride + w.zero_step * g))
            offset = float_at(w.offset + r * w.offset_stride + w.offset_step * g)
            g += 1
            end = min(last, g * w.group)
            for k in range(LANES + c - first, LANES + end - first):
                tile[k] = (tile[k] - zero) * scale + offset
            c = end
    tile[LANES + width : LANES * (chunks + 1)] = 0


@_compiled(inline="always")
def _prefetch(w, r, first, last):  # type: ignore[no-untyped-def]
    """Have what columns [first, last) of row r are decoded from, where there is such a row."""
    if r < w.rows:
        g, groups = first // w.group, (last - first + w.group - 1) // w.group
        source = _source_of(w, r, first)
        instructions.prefetch((source, _source_of(w, r, last) - source))
        instructions.prefetch((w.scale + r * w.scale_stride + g * w.scale_width, groups * w.scale_width))
        instructions.prefetch((w.micro + r * w.micro_stride + g, groups if w.micro_stride else 0))


@_compiled()
def _write(w, r, first, last, target, size, tile):  # type: ignore[no-untyped-def]
    """Columns [first, last) of row r to `target`, in numbers of `size` bytes; tile: room for float32."""
    loop, chunk = (w.rounding, w.rounded) if size == 2 else (w.decoding, w.decoded)
    if w.trits and chunk and first % (chunk * TRITS_A_BYTE):  # no whole byte
        chunk = 0
    whole = (last - first) // chunk * chunk if chunk else 0
    if whole:
        width = 2 * LANES if size == 2 and w.unrolled_pairs else LANES
        _run(w, loop, _source_of(w, r, first), r, first, whole // width, _per(w, whole // width, width), target, 0, 0)
    source, target, first = _address_of(tile), target + size * whole, first + whole
    while first < last:
        end = min(last, _end_of_tile(w, first))
        _decode_tile(w, r, first, end, tile)
        if size == 2:
            for c in range((end - first + LANES - 1) // LANES):
                instructions.round_chunk((source + 2 * LANES * c, source + 4 * LANES * c))
        instructions.copy((target, source, size * (end - first)))
        target, first = target + size * (end - first), end


@_compiled()
def _multiply_few(w, x, x_stride, count, y, size, start, stop):  # type: ignore[no-untyped-def]
    """To rows [start, stop) of y, which are those of the weight, their products with `count` rows of x.

    As many columns of x at a time as the first cache holds. Columns that fill no lanes are decoded: what lies behind
    them may be NaN, which no zero in x cancels.
    """
    wide = 4 * LANES // size  # columns of a chunk
    unrolled = w.unrolled if size == 4 else w.unrolled_pairs
    digits = w.trits and size == 4  # whose chunks are single columns
    whole = w.columns if digits else w.columns // unrolled * unrolled
    for block in range(start, stop, ROWS):
        end, first = min(stop, block + ROWS), 0
        while first < whole:
            last = whole if digits or count <= 2 else min(whole, _end_of_tile(w, first))
            chunks = last - first if digits else (last - first) // wide
            per = w.group if digits else _per(w, chunks, wide)
            for r in range(block, end):
                source = _source_of(w, r, first)
                if last - first < whole:
                    _prefetch(w, r + AHEAD, first, last)
                m = 0
                while m < count:
                    loop, by = _largest(w, size, count - m)
                    shown, sums = x + m * x_stride + size * first, y + 4 * (r * count + m)
                    _run(w, loop, source, r, first, chunks, per, sums, shown, x_stride)
                    m += by
            first = last
        if whole < w.columns:
            _multiply_rest(w, x, x_stride, count, y, size, block, end, whole)


@_compiled()
def _multiply_rest(w, x, x_stride, count, y, size, start, stop, first):  # type: ignore[no-untyped-def]
    """The same with columns from `first` on, less than a tile."""
    room, rest, wide = np.empty(COLUMNS + 2 * LANES, np.float32), np.zeros(4 * COLUMNS, np.uint8), 4 * LANES
    source = np.int64(rest.ctypes.data)
    for r in range(start, stop):
        _write(w, r, first, w.columns, source, size, room)
        for m in range(count):
            for c in range(0, size * (w.columns - first), wide):
                shown = x + m * x_stride + size * first + c
                instructions.add_products((size, source + c, shown, y + 4 * (r * count + m)))


@_compiled(inline="always")
def _largest(w, size, count):  # type: ignore[no-untyped-def]
    """The loop for the most rows of x up to `count`, and their number."""
    if size == 2 and count >= 8:
        return w.pairs_by_eight, 8
    if count >= 4:
        return w.by_four if size == 4 else w.pairs_by_four, 4
    if count >= 2:
        return w.by_two if size == 4 else w.pairs_by_two, 2
    return w.by_one if size == 4 else w.pairs_by_one, 1


@_compiled()
def _multiply_tiles(w, x, x_stride, count, y, size, start, stop):  # type: ignore[no-untyped-def]
    """The same by TOGETHER rows of the weight, which are decoded, as many columns as the first cache holds."""
    room, wide = np.empty(COLUMNS + 2 * LANES, np.float32), 4 * LANES
    stride = size * (COLUMNS + 2 * LANES)
    tile = np.zeros(TOGETHER * stride + LINE, np.uint8)
    start_of_line = -np.int64(tile.ctypes.data) % LINE
    source = np.int64(tile.ctypes.data) + start_of_line
    for row in range(start, stop, TOGETHER):
        first = 0
        while first < w.columns:
            last = _end_of_tile(w, first)
            width = size * (last - first)
            chunks = (width + wide - 1) // wide
            for r in range(min(TOGETHER, stop - row)):
                _write(w, row + r, first, last, source + r * stride, size, room)
                _prefetch(w, row + r + AHEAD, first, last)
            if width < chunks * wide:
                for r in range(TOGETHER):
                    tile[start_of_line + r * stride + width : start_of_line + r * stride + chunks * wide] = 0
            m = 0
            while m < count:
                by = SHARED if m + SHARED <= count else 2 if m + 2 <= count else 1
                at = (source, stride, x + x_stride * m + size * first, x_stride)
                instructions.products((size, by, *at, y + 4 * (row * count + m), 4 * count, chunks))
                m += by
            first = last


@_compiled()
def _run_task(at):  # type: ignore[no-untyped-def]
    task = carray(pointer_to(at), 1, TASK)[0]
    w = carray(pointer_to(task.weight), 1, WEIGHT)[0]
    start = take(at, task.step)
    while start < task.stop:
        stop = min(start + task.step, task.stop)
        if not task.x:
            tile = np.empty(COLUMNS + 2 * LANES, np.float32)
            for r in range(start, stop):
                row = task.y + task.size * (r - task.first) * w.columns
                _write(w, r, 0, w.columns, row, task.size, tile)
        elif task.rows <= FEW and (w.unrolled if task.size == 4 else w.unrolled_pairs):
            _multiply_few(w, task.x, task.x_stride, task.rows, task.y, task.size, start, stop)
        else:
            _multiply_tiles(w, task.x, task.x_stride, task.rows, task.y, task.size, start, stop)
        start = take(at, task.step)


def _entry(version: str) -> Any:
    """numba compiles again where this file changes; `version` is for the others."""

    def run(at):  # type: ignore[no-untyped-def]
        assert version
        _run_task(at)

    return kept_on_disk(partial(cfunc, types.void(types.intp)), run)


share = _entry(version())  # called with the address of a Task, by each thread
