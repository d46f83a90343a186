"""A weight as the compiled loops take it: where its tensors lie, and which loops serve it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.cpu.codes import Loop, levels_of
from llmquant.cpu.loops import loop
from llmquant.cpu.singles import SUMS
from llmquant.cpu.tasks import COLUMNS, Weight
from llmquant.cpu.vectors import DOTS, LANES
from llmquant_kernels.cpu_compiled import FLOAT, TABLE, TRITS, Encoded

# The loops for 1, 2, 4, .. rows of x at a time, in numbers of so many bytes.
BY = {
    4: ("by_one", "by_two", "by_four"),
    2: ("pairs_by_one", "pairs_by_two", "pairs_by_four", "pairs_by_eight"),
}
NEUTRAL = torch.tensor([1.0, 0.0, -0.0])  # a scale, a zero and an offset that change nothing


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
                self.fields[Weight._fields.index(name)] = loop(kind).address


def prepare(weight: Encoded) -> Ready:
    """Where its tensors lie: it does not keep them."""
    rows, columns = weight.shape
    stride, groups = weight.packed.shape[1], -(-columns // weight.group)
    apart, trits = weight.group % LANES != 0 and groups > 1, weight.way == TRITS
    loops = _loops_of(weight, groups, apart)
    rounding = loops["rounding"]

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
        decoded=0 if apart or trits else max(1, loops["decoding"].chunks) * LANES,
        rounded=max(1, rounding.chunks) * (2 if rounding.pairs else 0 if apart or trits else 1) * LANES,
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
    pair = kind._replace(size=2, pairs=2 if group == 16 else 1, long=groups == 1 or group >= 128)
    if pair.may_add and kind.scale_width == 1:
        pair = pair._replace(powers=_only_exponents(weight, kind))
    pair = pair._replace(chunks=1 if group == 16 else group // (2 * LANES) if group in (32, 64, 128) else 0)
    multiplied = {name: pair._replace(by=2**number) for number, name in enumerate(BY[2])}
    return {**loops, "rounding": pair, **multiplied}


def _only_exponents(weight: Encoded, kind: Loop) -> bool:
    """Whether scales are powers of two, no code stands for NaN, and weights have exponents that bfloat16 has."""
    scale = weight.scales[weight.scale.int()] * (weight.outer if weight.outer.numel() else 1.0)
    levels = weight.table if weight.way == TABLE else torch.from_numpy(levels_of(kind))
    if weight.bits == 8 and weight.way == FLOAT and kind.largest < 127:
        levels = levels[: kind.largest + 1]
        if bool(((weight.packed & 127) > kind.largest).any()):
            return False
    if not (scale.frexp().mantissa == 0.5).all() or not levels.isfinite().all():
        return False
    least, greatest = scale.aminmax()
    return least.item() >= 2.0**-126 and greatest.item() * levels.abs().max().item() * 2.0**kind.exponent < 2.0**127
