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
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor
from torch.nn import functional

from llmquant import cpu_llvm
from llmquant.cpu_llvm import EIGHT, LANES, PAIR, SUMS, TOGETHER, Loop, byte_at, call, float_at, pointer_to, take
from llmquant_kernels.cpu_compiled import TRITS, Encoded

# Columns that are decoded at a time: with those of x they stay in the first cache. A whole number of lanes.
COLUMNS = 1280
FEW = 8  # rows of x up to which the weight is decoded for each four, or two, or one, of them
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
    decoding: int  # addresses of loops, to float32
    rounding: int  # to bfloat16
    by_one: int  # that multiply by so many rows of x; 0: there is none
    by_two: int
    by_four: int
    unrolled: int  # columns that these take at a time


class Task(NamedTuple):
    """What threads do together. Each takes `step` rows of the weight, and more until there are none."""

    next: int  # the first row that nobody has taken
    stop: int
    step: int
    weight: int  # address of a Weight
    x: int  # address of what is multiplied, 0 where the weight is decoded
    width: int  # columns of x
    y: int  # address of what is written
    first: int  # the row of the weight that comes first there
    size: int  # rows of x, or bytes of a decoded number


class Ready(NamedTuple):
    fields: array[int]  # a Weight, as the compiled loops read it
    rows: int
    columns: int
    trits: bool


def multiply(weight: Ready, x: Tensor) -> Tensor:
    """x (rows, in) float32, contiguous -> (rows, out) float32."""
    count, columns = x.shape
    if not count:  # which has no address
        return x.new_empty(0, weight.rows)
    if columns % LANES or weight.trits:  # what is read behind a row
        x = functional.pad(x, (0, -columns % LANES + LANES))
    y = torch.zeros(-(-weight.rows // TOGETHER) * TOGETHER, count)
    _in_threads(weight, 0, weight.rows, columns * count, x.data_ptr(), x.shape[1], y.data_ptr(), count)
    return y[: weight.rows].t().contiguous()


def decode(weight: Ready, start: int, out: Tensor) -> None:
    """Write the rows of the weight from `start` on to out (rows, in), float32 or bfloat16, contiguous."""
    _in_threads(weight, start, start + len(out), weight.columns, 0, 0, out.data_ptr(), out.element_size())


def prepare(weight: Encoded) -> Ready:
    """Where its tensors lie: it does not keep them."""
    rows, columns = weight.shape
    stride, groups = weight.packed.shape[1], -(-columns // weight.group)
    apart, trits = weight.group % LANES != 0 and groups > 1, weight.way == TRITS
    kind = Loop(
        *(weight.way, weight.bits, weight.sign, weight.least, weight.mantissa, weight.exponent, weight.largest),
        scale_width=4 if apart else weight.scale.shape[1] // groups,
        chunks=weight.group // LANES if weight.group == 16 else 0,
        outer=weight.outer.numel() > 0 and not apart,
        halved=weight.micro.numel() > 0,
        zero=weight.zero.numel() > 0 and not apart,
        offset=weight.offset.numel() > 0 and not apart,
    )

    chunks = weight.group // LANES if weight.group // LANES in SUMS and not weight.group % LANES else 0
    product = kind._replace(chunks=chunks)
    if trits:
        product = product._replace(scale_width=weight.scale.shape[1] // groups, outer=weight.outer.numel() > 0)
    served = weight.zero.numel() + weight.offset.numel() == 0 if trits else not apart

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
        decoding=cpu_llvm.loop(kind).address,
        rounding=cpu_llvm.loop(kind._replace(size=2)).address,
        by_one=cpu_llvm.loop(product._replace(by=1)).address if served else 0,
        by_two=cpu_llvm.loop(product._replace(by=2)).address if served else 0,
        by_four=cpu_llvm.loop(product._replace(by=4)).address if served else 0,
        unrolled=max(1, chunks) * LANES,
    )
    return Ready(array("q", fields), rows, columns, trits)


def _in_threads(weight: Ready, start: int, stop: int, each: int, x: int, width: int, y: int, count: int) -> None:
    """A Task for as many threads as torch may use; each: multiplications of a row."""
    threads = max(1, min(torch.get_num_threads(), (stop - start) * each // LEAST_WORK, (stop - start) // TOGETHER))
    step = -(-(stop - start) // (threads * TURNS * TOGETHER)) * TOGETHER if threads > 1 else stop - start
    task = array("q", Task(start, stop, step, weight.fields.buffer_info()[0], x, width, y, start, count))
    if threads > 1:
        _team()(_share.address, task.buffer_info()[0], threads, 0)
    else:
        _share.ctypes(task.buffer_info()[0])


@cache
def _team() -> Callable[[int, int, int, int], None]:
    """(function, its argument, threads, 0): call it in each of torch's own threads, which wait for work awake.

    It is what compilers call for a parallel region of OpenMP.
    """
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    parallel = library.GOMP_parallel
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


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
    return row + first // EIGHT * w.bits


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
def _per(w, chunks):  # type: ignore[no-untyped-def]
    """How many chunks make a group."""
    return chunks if w.groups == 1 else w.group // LANES


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
        _run(w, w.decoding, source, r, first, chunks, _per(w, chunks), target, 0, 0)
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


@_compiled()
def _decode(w, out, size, origin, start, stop):  # type: ignore[no-untyped-def]
    """Rows [start, stop) to `out`, in numbers of `size` bytes, whose first row is row `origin`."""
    tile = np.empty(COLUMNS + 2 * LANES, np.float32)
    source = _address_of(tile)
    chunks = 0 if w.apart or w.trits else w.columns // LANES
    loop = w.rounding if size == 2 else w.decoding
    for r in range(start, stop):
        row = out + size * (r - origin) * w.columns
        if chunks:
            _run(w, loop, _source_of(w, r, 0), r, 0, chunks, _per(w, chunks), row, 0, 0)
        first = chunks * LANES
        while first < w.columns:
            last = _end_of_tile(w, first)
            _decode_tile(w, r, first, last, tile)
            if size == 2:
                for c in range((last - first + LANES - 1) // LANES):
                    cpu_llvm.round_chunk((source + 2 * LANES * c, source + 4 * LANES * c))
            cpu_llvm.copy((row + size * first, source, size * (last - first)))
            first = last


@_compiled()
def _multiply_few(w, x, width, y, count, start, stop):  # type: ignore[no-untyped-def]
    """Columns that fill no lanes are decoded: what lies behind them may be NaN, which no zero in x cancels."""
    tile = np.empty(w.unrolled + 2 * LANES, np.float32)
    whole = w.columns // w.unrolled * w.unrolled
    chunks, per = whole // LANES, _per(w, whole // LANES)
    if w.trits:
        whole, chunks, per = w.columns, w.columns, w.group
    for r in range(start, stop):
        source = w.packed + r * w.stride if w.trits else _source_of(w, r, 0)
        m = 0
        while whole and m < count:
            loop, by = w.by_one, 1
            if m + 2 <= count:
                loop, by = w.by_two, 2
            if m + 4 <= count:
                loop, by = w.by_four, 4
            _run(w, loop, source, r, 0, chunks, per, y + 4 * (r * count + m), x + 4 * m * width, 4 * width)
            m += by
        if whole < w.columns:
            _decode_tile(w, r, whole, w.columns, tile)
            for m in range(count):
                for c in range(0, w.columns - whole, LANES):
                    place = x + 4 * (m * width + whole + c)
                    cpu_llvm.add_products((_address_of(tile) + 4 * c, place, y + 4 * (r * count + m)))


@_compiled()
def _multiply(w, x, width, y, count, start, stop):  # type: ignore[no-untyped-def]
    """To rows [start, stop) of y, which are those of the weight, their products with `count` rows of x.

    x and y: addresses; width: columns of x, whole lanes.
    """
    if count <= FEW and w.by_one:
        _multiply_few(w, x, width, y, count, start, stop)
        return
    tile = np.zeros((TOGETHER, COLUMNS + 2 * LANES), np.float32)
    source, stride = _address_of(tile), 4 * (COLUMNS + 2 * LANES)
    for row in range(start, stop, TOGETHER):
        first = 0
        while first < w.columns:
            last = _end_of_tile(w, first)
            for r in range(min(TOGETHER, stop - row)):
                _decode_tile(w, row + r, first, last, tile[r])
            chunks = (last - first + LANES - 1) // LANES
            for m in range(0, count, PAIR):
                places = (source, stride, x + 4 * (m * width + first), 4 * width, y + 4 * (row * count + m), 4 * count)
                if m + 1 < count:
                    cpu_llvm.products_of_pair((*places, chunks))
                else:
                    cpu_llvm.products_of_one((*places, chunks))
            first = last


def _entry(version: str) -> Any:
    """What is called from here. numba compiles again where this file changes; `version` is for the other one."""

    def share(at):  # type: ignore[no-untyped-def]
        assert version
        task = carray(pointer_to(at), 1, TASK)[0]
        w = carray(pointer_to(task.weight), 1, WEIGHT)[0]
        start = take(at, task.step)
        while start < task.stop:
            stop = min(start + task.step, task.stop)
            if task.x:
                _multiply(w, task.x, task.width, task.y, task.size, start, stop)
            else:
                _decode(w, task.y, task.size, task.first, start, stop)
            start = take(at, task.step)

    return cpu_llvm.kept_on_disk(partial(cfunc, types.void(types.intp)), share)


_share = _entry(hashlib.sha256(Path(cpu_llvm.__file__).read_bytes()).hexdigest())
