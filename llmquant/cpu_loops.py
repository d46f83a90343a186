"""Products on a CPU by weights that stay as they are: what llmquant_kernels.cpu_compiled multiplies with.

Few rows of x are multiplied by codes as they are decoded. For more, four rows of the weight are decoded at a time, as
many columns as the first cache holds, and multiplied by x from there. The loops over codes are those of cpu_llvm.

What is common to all formats is compiled at the first product, a loop at the first product of its format; all of it is
kept on disk.
"""

from __future__ import annotations

import ctypes
import hashlib
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor
from torch.nn import functional

from llmquant import cpu_llvm
from llmquant.cpu_llvm import (
    EIGHT,
    LANES,
    SHARED,
    SUMS,
    TOGETHER,
    TRITS_A_BYTE,
    Loop,
    byte_at,
    call,
    float_at,
    pointer_to,
    take,
)
from llmquant_kernels.cpu_compiled import FLOAT, TABLE, TRITS, Encoded

# Columns that are decoded at a time: with those of x they stay in the first cache. A whole number of lanes.
COLUMNS = 1280
DOTS = cpu_llvm.DOTS  # see llmquant_kernels.cpu_compiled.Loops
ROWS = 64  # of the weight whose products with few rows of x stay there too
AHEAD = 12  # rows of the weight: what is read of one is too little for a processor to see what comes next
FEW = 8  # rows of x up to which the weight is decoded for each four, or two, or one, of them
# Rows of x up to which all of it is faster than torch's product with decoded blocks, by bytes of what is multiplied.
# With AMX, which was not at hand, that product costs next to nothing.
MOST_ROWS = {4: 128, 2: 16 if "+amx-bf16" in cpu_llvm.FEATURES else 48}
ROUNDED_UP = {3: 4, 5: 8, 6: 8, 7: 8}  # where to decode once more costs more than to multiply zeros
# The loops for 1, 2, 4, .. rows of x at a time, in numbers of so many bytes.
BY = {
    4: ("by_one", "by_two", "by_four"),
    2: ("pairs_by_one", "pairs_by_two", "pairs_by_four", "pairs_by_eight"),
}
# Multiplications below which another thread costs more than it gains.
LEAST_WORK = 2**16
TURNS = 4  # runs of rows that each thread takes, for none to wait long for one that something disturbs
NEUTRAL = torch.tensor([1.0, 0.0, -0.0])  # a scale, a zero and an offset that change nothing


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
    rounded: int  # columns that are decoded to bfloat16 at a time, 0: one tile
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


class Ready(NamedTuple):
    fields: array[int]  # a Weight, as the compiled loops read it
    rows: int
    columns: int
    trits: bool
    pairs: bool  # whether few rows of bfloat16 are multiplied by codes as they are decoded
    loops: dict[str, Loop]  # by the field for their address, those that are not compiled yet

    def compile(self, names: Iterable[str]) -> None:
        for name in names:
            if kind := self.loops.pop(name, None):
                self.fields[Weight._fields.index(name)] = cpu_llvm.loop(kind).address


def most_rows(dtype: torch.dtype) -> int:
    """How many rows of x `multiply` is for."""
    return MOST_ROWS[2 if dtype == torch.bfloat16 and DOTS else 4]


def multiply(weight: Ready, x: Tensor) -> Tensor:
    """x (rows, in) float32, or bfloat16 where DOTS, contiguous -> (rows, out) float32."""
    rows, columns = x.shape
    if not rows:  # which have no address
        return x.new_empty(0, weight.rows, dtype=torch.float32)
    if x.dtype == torch.bfloat16 and rows <= FEW and not weight.pairs:
        x = x.float()
    size, count = x.element_size(), rows
    if size == 2 and rows in ROUNDED_UP:
        x, rows = functional.pad(x, (0, 0, 0, ROUNDED_UP[rows] - rows)), ROUNDED_UP[rows]
    weight.compile(_needed(rows, size))
    # What is read behind a row; and rows that lie a power of two apart would take each other's place in the cache.
    if columns * size % (4 * LANES) or weight.trits or rows > 4:
        x = functional.pad(x, (0, -columns % (2 * LANES) + 2 * LANES))
    y = torch.zeros(-(-weight.rows // TOGETHER) * TOGETHER, rows)
    where = {"x": x.data_ptr(), "x_stride": size * x.shape[1], "rows": rows, "y": y.data_ptr(), "size": size}
    _in_threads(weight, 0, weight.rows, rows, where)
    return y[: weight.rows, :count].t().contiguous()


@cache
def _needed(rows: int, size: int) -> tuple[str, ...]:
    """The loops that multiply so many rows of x, in numbers of `size` bytes."""
    decoding = ("decoding", "rounding") if size == 2 else ("decoding",)
    by = [name for number, name in enumerate(BY[size]) if 2**number <= rows <= FEW]
    return (*decoding, *by)


def decode(weight: Ready, start: int, out: Tensor) -> None:
    """Write the rows of the weight from `start` on to out (rows, in), float32 or bfloat16, contiguous."""
    weight.compile(_needed(0, out.element_size()))
    where = {"x": 0, "x_stride": 0, "rows": 0, "y": out.data_ptr(), "size": out.element_size()}
    _in_threads(weight, start, start + len(out), 1, where)


def prepare(weight: Encoded) -> Ready:
    """Where its tensors lie: it does not keep them."""
    rows, columns = weight.shape
    stride, groups = weight.packed.shape[1], -(-columns // weight.group)
    apart, trits = weight.group % LANES != 0 and groups > 1, weight.way == TRITS
    loops = _loops_of(weight, groups, apart)

    def row(grid: Tensor) -> int:
        return grid.stride(0) * grid.element_size() if len(grid) > 1 else 0

    def step(grid: Tensor) -> int:
        return grid.element_size() if grid.shape[1] > 1 else 0

    def place(grid: Tensor, neutral: int) -> int:
        return grid.data_ptr() if grid.numel() else NEUTRAL[neutral:].data_ptr()

    fields = Weight(
        packed=weight.packed.data_ptr(),
        tail=weight.tail.data_ptr(),
        table=weight.table.data_ptr(),
        scale=weight.scale.data_ptr(),
        scales=weight.scales.data_ptr(),
        zero=place(weight.zero, 1),
        outer=place(weight.outer, 0),
        offset=place(weight.offset, 2),
        micro=weight.micro.data_ptr(),
        neutral=NEUTRAL.data_ptr(),
        rows=rows,
        columns=columns,
        groups=groups,
        stride=stride,
        spared=rows - (len(weight.tail) - 16) // stride,
        table_stride=row(weight.table),
        scale_stride=row(weight.scale),
        scale_width=weight.scale.shape[1] // groups,
        outer_stride=row(weight.outer),
        zero_stride=row(weight.zero),
        zero_step=step(weight.zero),
        offset_stride=row(weight.offset),
        offset_step=step(weight.offset),
        micro_stride=weight.micro.shape[1],
        bits=weight.bits,
        group=weight.group,
        trits=trits,
        apart=apart,
        unrolled=max(1, loops["by_one"].chunks) * LANES if "by_one" in loops else 0,
        unrolled_pairs=max(1, loops["pairs_by_one"].chunks) * 2 * LANES if "pairs_by_one" in loops else 0,
        rounded=2 * LANES if loops["rounding"].pairs else 0 if apart or trits else LANES,
    )
    return Ready(array("q", fields), rows, columns, trits, "pairs_by_one" in loops, loops)


def _loops_of(weight: Encoded, groups: int, apart: bool) -> dict[str, Loop]:
    """What decodes it and what multiplies by it, by the field of Weight."""
    trits, group = weight.way == TRITS, weight.group
    kind = Loop(
        *(weight.way, weight.bits, weight.sign, weight.least, weight.mantissa, weight.exponent, weight.largest),
        scale_width=4 if apart else weight.scale.shape[1] // groups,
        chunks=group // LANES if group == 16 else 0,
        outer=weight.outer.numel() > 0 and not apart,
        halved=weight.micro.numel() > 0,
        zero=weight.zero.numel() > 0 and not apart,
        offset=weight.offset.numel() > 0 and not apart,
    )
    loops = {"decoding": kind, "rounding": kind._replace(size=2)}
    product = kind._replace(chunks=group // LANES if group // LANES in SUMS and not group % LANES else 0)
    if trits:
        product = product._replace(scale_width=weight.scale.shape[1] // groups, outer=weight.outer.numel() > 0)
    if not (weight.zero.numel() or weight.offset.numel() if trits else apart):
        loops |= {name: product._replace(by=2**number) for number, name in enumerate(BY[4])}
    if not DOTS or apart or (groups > 1 and group != 16 and group % (2 * LANES)):
        return loops
    if trits and groups > 1 and (COLUMNS % group if group < COLUMNS else group % COLUMNS):
        return loops  # tiles would not begin on a whole byte
    powers = weight.scale.shape[1] == groups and _only_exponents(weight, kind)
    pair = kind._replace(size=2, pairs=2 if group == 16 else 1, long=groups == 1 or group >= 128, powers=powers)
    chunks = 1 if group == 16 else group // (2 * LANES) if group in (32, 64, 128) else 0
    multiplied = {name: pair._replace(by=2**number, chunks=chunks) for number, name in enumerate(BY[2])}
    return {**loops, "rounding": pair, **multiplied}


def _only_exponents(weight: Encoded, kind: Loop) -> bool:
    """Whether scales are powers of two, and no code stands for more than the greatest bfloat16, or for NaN."""
    if weight.way == TRITS or weight.zero.numel() or weight.offset.numel():
        return False
    scale = weight.scales[weight.scale.int()] * (weight.outer if weight.outer.numel() else 1.0)
    levels = weight.table if weight.way == TABLE else torch.from_numpy(cpu_llvm.levels_of(kind))
    if weight.bits == 8 and weight.way == FLOAT and kind.largest < 127:
        levels = levels[: kind.largest + 1]
        if bool(((weight.packed & 127) > kind.largest).any()):
            return False
    powers = bool((scale.frexp().mantissa == 0.5).all() and levels.isfinite().all())
    return powers and scale.max().item() * levels.abs().max().item() * 2.0**kind.exponent < 2.0**127


def _in_threads(weight: Ready, start: int, stop: int, times: int, where: dict[str, int]) -> None:
    """A Task for as many threads as torch may use; times: how often each weight is multiplied."""
    work = (stop - start) * weight.columns * times
    threads = max(1, min(torch.get_num_threads(), work // LEAST_WORK, (stop - start) // TOGETHER))
    step = -(-(stop - start) // (threads * TURNS * TOGETHER)) * TOGETHER if threads > 1 else stop - start
    address = weight.fields.buffer_info()[0]
    task = array("q", Task(next=start, stop=stop, step=step, weight=address, first=start, **where))
    if threads > 1:
        _team()(_share.address, task.buffer_info()[0], threads, 0)
    else:
        _share.ctypes(task.buffer_info()[0])


@cache
def _team() -> Callable[[int, int, int, int], object]:
    """(function, its argument, threads, 0): call it in each of torch's own threads, which wait for work awake.

    It is what compilers call for a parallel region of OpenMP. Where torch has none, plain threads do it.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    try:
        parallel = library.GOMP_parallel
    except AttributeError:
        return _in_plain_threads
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


def _in_plain_threads(function: int, given: int, threads: int, _: int) -> None:
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [given] * threads))


# ---- compiled


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
    """Columns [first, last) of row r to tile[8:], rounded up to whole lanes, with zeros there."""
    target, source, width = _address_of(tile), _source_of(w, r, first), last - first
    chunks = (width + LANES - 1) // LANES
    if w.trits:
        source, past = w.packed + r * w.stride + first // 5, first % 5
        for i in range((past + width + 4) // 5):  # of the eight three are overwritten
            cpu_llvm.copy_eight((target + 4 * (5 * i - past), w.table + 32 * np.int64(byte_at(source + i))))
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
        cpu_llvm.prefetch((source, _source_of(w, r, last) - source))
        cpu_llvm.prefetch((w.scale + r * w.scale_stride + g * w.scale_width, groups * w.scale_width))
        cpu_llvm.prefetch((w.micro + r * w.micro_stride + g, groups if w.micro_stride else 0))


@_compiled()
def _write(w, r, first, last, target, size, tile):  # type: ignore[no-untyped-def]
    """Columns [first, last) of row r to `target`, in numbers of `size` bytes; tile: room for float32."""
    loop, chunk = (w.rounding, w.rounded) if size == 2 else (w.decoding, 0 if w.apart or w.trits else LANES)
    if w.trits and first % (chunk * TRITS_A_BYTE if chunk else 1):  # no whole byte
        chunk = 0
    chunks = (last - first) // chunk if chunk else 0
    if chunks:
        _run(w, loop, _source_of(w, r, first), r, first, chunks, _per(w, chunks, chunk), target, 0, 0)
    source, target, first = _address_of(tile), target + size * chunk * chunks, first + chunk * chunks
    while first < last:
        end = min(last, _end_of_tile(w, first))
        _decode_tile(w, r, first, end, tile)
        if size == 2:
            for c in range((end - first + LANES - 1) // LANES):
                cpu_llvm.round_chunk((source + 2 * LANES * c, source + 4 * LANES * c))
        cpu_llvm.copy((target, source, size * (end - first)))
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
                given = (source + c, x + m * x_stride + size * first + c, y + 4 * (r * count + m))
                if size == 4:
                    cpu_llvm.add_products(given)
                else:
                    cpu_llvm.add_pairs(given)


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
    tile = np.zeros((TOGETHER, size * (COLUMNS + 2 * LANES)), np.uint8)
    source, stride = np.int64(tile.ctypes.data), tile.shape[1]
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
                tile[:, width : chunks * wide] = 0
            m = 0
            while m < count:
                by = SHARED if m + SHARED <= count else 2 if m + 2 <= count else 1
                at = (source, stride, x + x_stride * m + size * first, x_stride)
                _products(size, by, (*at, y + 4 * (row * count + m), 4 * count, chunks))
                m += by
            first = last


@_compiled(inline="always")
def _products(size, by, given):  # type: ignore[no-untyped-def]
    if size == 4:
        if by == 4:
            cpu_llvm.by_four(given)
        elif by == 2:
            cpu_llvm.by_two(given)
        else:
            cpu_llvm.by_one(given)
    elif by == 4:
        cpu_llvm.pairs_by_four(given)
    elif by == 2:
        cpu_llvm.pairs_by_two(given)
    else:
        cpu_llvm.pairs_by_one(given)


def _entry(version: str) -> Any:
    """What is called from here. numba compiles again where this file changes; `version` is for the other one."""

    def share(at):  # type: ignore[no-untyped-def]
        assert version
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

    return cpu_llvm.kept_on_disk(partial(cfunc, types.void(types.intp)), share)


_share = _entry(hashlib.sha256(Path(cpu_llvm.__file__).read_bytes()).hexdigest())
