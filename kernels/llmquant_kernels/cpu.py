"""CPU backends: torch's operators for few rows of x where they apply, otherwise decoding in blocks of rows.

For inference: the operators have no derivative.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from .reference import decode, of_rows, unpack
from .weight import DTYPES, Facts, PackedWeight, Prepared

_int4_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_int4_linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int8_linear = torch.ops.aten._weight_int8pack_mm.default

# Rows of x up to which an operator for few rows beats decoding followed by a dense product. Milliseconds of one thread
# on an Intel Xeon with AMX, torch 2.13, weight 4096x4096, groups of 128 (int8: one scale per row):
#     rows               1      4      8     16     28     32     36     40
#     int4            0.88   1.65   3.32   6.54  11.57  13.18  14.70  16.20    decoding 12.6 to 15.4
#     int8            0.95   1.75   3.29   6.54  11.62  13.46  15.12  16.51    decoding 11.9 to 14.2
#     a pair of int4  1.78   3.34   6.76  13.46  23.33  26.55  29.94  33.37    decoding 12.7 to 14.3
#     dense bfloat16   2.5    2.5    2.3    2.5    3.0    3.3    4.1    4.4
# The operators go by four rows at a time, hence multiples of four.
ROWS_INT4 = 36
ROWS_INT8 = 28
ROWS_PAIR = 12
# The same against a decoded weight that is kept: the last line.
ROWS_INT4_KEPT = ROWS_INT8_KEPT = 4
ROWS_PAIR_KEPT = 1
# Weights decoded at a time. Fewer stay in a smaller cache but pay for more calls: 2**18 takes a third longer in all.
BLOCK = 2**21
# Codes that a table decodes at once, by their bits. 16 bits of an index take half the time of 8, but half a megabyte.
CODES_PER_ENTRY = {1: 8, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 1}
CODES_PER_ENTRY_OF_LEVELS = {**CODES_PER_ENTRY, 4: 2}
# The dtype that moves so many bytes as one element.
ENTRIES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class CpuDecode(Prepared):
    """Decodes a block of rows at a time and multiplies by it, so that the dense weight never exists as a whole.

    Several codes at once are looked up in a table of their levels. Holds the PackedWeight, and a table of at most 128
    KB if it has levels of its own (integers share one, of at most 1 MB); with `keep_decoded` the decoded weight too.
    """

    name = "cpu_decode"

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype)
        self.weight = weight
        columns, bits = weight.shape[1], weight.bits
        # Integers up to 255 are exact in any dtype; a level that is not must wait for its rounding until it is scaled.
        inexact = weight.levels is not None and bool((weight.levels.to(dtype) != weight.levels).any())
        self.levels_dtype = torch.float32 if inexact else dtype
        self.per_entry = CODES_PER_ENTRY[bits] if weight.levels is None else CODES_PER_ENTRY_OF_LEVELS[bits]
        whole_groups = weight.group >= columns or columns % weight.group == 0
        whole_entries = columns % (self.per_entry if 8 % bits == 0 else 32) == 0
        self.by_table = whole_groups and whole_entries and self.per_entry * self.levels_dtype.itemsize in ENTRIES
        self.table: Tensor | None = None
        if self.by_table and weight.levels is not None:
            self.table = _table(weight.levels, bits, self.per_entry, self.levels_dtype)
        self.block = max(16, BLOCK // columns // 16 * 16)
        starts = range(0, weight.shape[0], self.block)
        self.decoded = torch.cat([self.rows(start) for start in starts]) if keep_decoded else None

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if facts.device != "cpu":
            return f"runs on the CPU only, the weight is on {facts.device}"
        if dtype not in DTYPES:
            return f"activations must be float16, bfloat16 or float32, not {dtype}"
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            raise self.wrong_dtype(x)
        if self.decoded is not None:
            return functional.linear(x, self.decoded, bias)
        starts = range(0, self.shape[0], self.block)
        biases = [None] * len(starts) if bias is None else bias.split(self.block)
        return torch.cat([functional.linear(x, self.rows(r), b) for r, b in zip(starts, biases, strict=True)], dim=-1)

    def rows(self, start: int) -> Tensor:
        """The decoded rows of the block that begins at `start`, (rows, in)."""
        weight, stop = self.weight, min(start + self.block, self.shape[0])
        if not self.by_table:
            return decode(weight, self.dtype, start, stop)
        entries = _entries(weight.packed[start:stop], weight.bits * self.per_entry, self.shape[1] // self.per_entry)
        if weight.levels is None and weight.bits == 8:
            levels = entries.to(self.dtype, memory_format=torch.contiguous_format)
        else:
            table = _table_of_integers(weight.bits, self.per_entry, self.dtype) if self.table is None else self.table
            levels = table.index_select(0, entries.int().flatten()).view(self.levels_dtype)
        scale = of_rows(weight.scale, start, stop)
        shift = -(of_rows(weight.zero, start, stop) if isinstance(weight.zero, Tensor) else weight.zero) * scale
        if weight.offset is not None:
            shift = shift + of_rows(weight.offset, start, stop)
        return _affine(levels.view(stop - start, weight.groups, -1), scale, shift).view(stop - start, -1).to(self.dtype)


def _entries(packed: Tensor, width: int, count: int) -> Tensor:
    """The bit streams (rows, words) int32 cut into `count` unsigned integers of `width` bits, (rows, count)."""
    if width == 8:
        return packed.view(torch.uint8)[:, :count]
    if width == 16:
        return packed.view(torch.int16)[:, :count].int().bitwise_and_(0xFFFF)
    common = gcd(width, 32)  # 32 // common integers fill width // common words
    words = packed[:, : count * width // 32].unflatten(1, (-1, width // common))
    entries = torch.empty(*words.shape[:2], 32 // common, dtype=torch.int32)
    for i in range(32 // common):
        word, shift = divmod(i * width, 32)
        entry = words[..., word] >> shift
        if shift + width > 32:
            entry = entry & 2 ** (32 - shift) - 1 | words[..., word + 1] << (32 - shift)
        torch.bitwise_and(entry, 2**width - 1, out=entries[..., i])
    return entries.flatten(1)


def _table(levels: Tensor, bits: int, per_entry: int, dtype: torch.dtype) -> Tensor:
    """For every sequence of `per_entry` codes, lowest first, their levels side by side in one wide element."""
    index = torch.arange(2 ** (bits * per_entry))
    codes = torch.stack([index >> i * bits & 2**bits - 1 for i in range(per_entry)], dim=1)
    return levels[codes].to(dtype).view(ENTRIES[per_entry * dtype.itemsize]).view(-1)


@cache
def _table_of_integers(bits: int, per_entry: int, dtype: torch.dtype) -> Tensor:
    return _table(torch.arange(2**bits), bits, per_entry, dtype)


def _affine(levels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``levels * scale + shift`` in float32, rounded once to the dtype of levels.

    levels (rows, groups, group); scale and shift (rows or 1, groups, 1) float32. Batch normalization is the one
    operator of torch that multiplies a low precision by float32 in a single pass: elementwise operators promote the
    whole operand first and take nine times as long.
    """
    rows, groups, _ = levels.shape
    scale, shift = (grid.expand(rows, groups, 1).reshape(-1) for grid in (scale, shift))
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.batch_norm(levels.view(1, rows * groups, -1), scale, shift, zeros, ones, False, 0.0, 0.0, False)


class FewRows(CpuDecode):
    """A backend with an operator for few rows of x, bfloat16 only; more than `limit` rows are taken by CpuDecode."""

    limit: int
    limit_kept: int  # with a kept decoded weight

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype, keep_decoded)
        if keep_decoded:
            self.limit = self.limit_kept

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if reason := super().refuses(facts, dtype):
            return reason
        if dtype != torch.bfloat16:
            return f"the operator is fast for bfloat16 activations only, not {dtype}"
        if facts.has_levels:
            return "the operator knows integers, not tables of levels"
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            raise self.wrong_dtype(x)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if flat.shape[0] > self.limit:
            return super().linear(x, bias)
        y = self.few(flat.contiguous())
        if bias is not None:
            y += bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @abstractmethod
    def few(self, x: Tensor) -> Tensor:
        """``x @ w.T`` for x (rows, in), contiguous."""


class CpuInt4(FewRows):
    """Codes of up to 4 bits by torch's int4 operator, which computes ``(q - 8) * s + z`` with s and z in bfloat16.

    Rounding a float16 scale costs no more than a dense bfloat16 weight loses by the rounding of its elements. z needs
    no rounding where the codes can be moved to put their zero in the middle: with less than 4 bits, or a zero of 8.

    Holds the PackedWeight and a copy of the codes at 4 bits, with 32 bits for each group of at most 256.
    """

    name = "cpu_int4"
    bits = range(1, 5)
    limit, limit_kept = ROWS_INT4, ROWS_INT4_KEPT

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype, keep_decoded)
        self.group = _int4_group(weight.shape[1], weight.group)
        codes, zero = _moved(weight, 8, 15)
        self.codes = _int4_pack(codes, 1)
        self.grid = torch.stack(_int4_grid(weight, codes, zero, self.group, 8), dim=-1).bfloat16()

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if reason := super().refuses(facts, dtype):
            return reason
        if facts.bits not in cls.bits:
            return f"takes {cls.bits[0]} to {cls.bits[-1]} bits, not {facts.bits}"
        if facts.shape[0] % 16:
            return f"out must be a multiple of 16, not {facts.shape[0]}"
        if not _int4_group(facts.shape[1], facts.group):
            return f"in and group must be multiples of 32, not {facts.shape[1]} and {facts.group}"
        return None

    def few(self, x: Tensor) -> Tensor:
        return _int4_linear(x, self.codes, self.group, self.grid)


class CpuInt8(FewRows):
    """Integers of 8 bits with one scale per row by torch's int8 operator, which applies a bfloat16 scale at the end.

    Holds the PackedWeight and a copy of the codes at 8 bits.
    """

    name = "cpu_int8"
    limit, limit_kept = ROWS_INT8, ROWS_INT8_KEPT

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype, keep_decoded)
        assert isinstance(weight.zero, int)  # see refuses
        codes = unpack(weight.packed, weight.bits, weight.shape[1])
        self.codes = (codes.short() - weight.zero).to(torch.int8, memory_format=torch.contiguous_format)
        self.scale = weight.scale.expand(weight.shape[0], 1).flatten().to(dtype)

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if reason := super().refuses(facts, dtype):
            return reason
        columns = facts.shape[1]
        if facts.group < columns:
            return f"knows one scale per row, not groups of {facts.group}"
        if columns % 16:
            return f"in must be a multiple of 16, not {columns}: the operator reads past the end of others"
        if facts.has_offset or facts.zero is None:
            return "knows neither an offset nor a zero point per row"
        if not 2**facts.bits - 128 <= facts.zero <= 128:
            return f"codes of {facts.bits} bits less a zero point of {facts.zero} do not fit 8 bits"
        return None

    def few(self, x: Tensor) -> Tensor:
        return _int8_linear(x, self.codes, self.scale)


class CpuInt4Pair(CpuInt4):
    """Codes of 5 to 8 bits with a scale per group as two weights of the int4 operator: ``q = 16 * high + low``.

    Each has a z. Between them they centre both halves, for neither result to be large beside the sum, and the z of the
    low half takes what the other lost by rounding: a group shares that error, and 8 bits are fine enough to feel it.

    Holds the PackedWeight and a copy of the codes at 8 bits, with 64 bits for each group of at most 256.
    """

    name = "cpu_int4_pair"
    bits = range(5, 9)
    limit, limit_kept = ROWS_PAIR, ROWS_PAIR_KEPT

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        FewRows.__init__(self, weight, dtype, keep_decoded)
        self.group = _int4_group(weight.shape[1], weight.group)
        # q - 136 == 16 * (high - 8) + (low - 8)
        codes, zero = _moved(weight, 136, 255)
        low = codes & 15
        self.codes, self.high = _int4_pack(low, 1), _int4_pack(codes >> 4, 1)
        scale, shift = _int4_grid(weight, codes, zero, self.group, 136)
        low_shift = (8 - _means(low, self.group)).t() * scale
        high_shift = (shift - low_shift).bfloat16().float()
        self.grid = torch.stack([scale, shift - high_shift], dim=-1).bfloat16()
        self.high_grid = torch.stack([scale * 16, high_shift], dim=-1).bfloat16()

    def few(self, x: Tensor) -> Tensor:
        return super().few(x).add_(_int4_linear(x, self.high, self.group, self.high_grid))


def _int4_group(columns: int, group: int) -> int:
    """The largest group of the int4 operator that divides both, 0 where none does."""
    return next((g for g in (256, 128, 64, 32) if columns % g == 0 and (group % g == 0 or group >= columns)), 0)


def _moved(weight: PackedWeight, centre: int, top: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and zeros (out or 1, groups), int32, moved together so that zeros come near to `centre`.

    As far as codes stay within 0 and `top`. A zero at the centre needs no z, which would be rounded.
    """
    zero = weight.zero if isinstance(weight.zero, Tensor) else torch.tensor([[weight.zero]]).expand(1, weight.groups)
    zero = zero.int()
    move = (centre - zero).clamp(0, top + 1 - 2**weight.bits)
    columns = torch.arange(weight.shape[1]) // weight.group
    return unpack(weight.packed, weight.bits, weight.shape[1]) + move[:, columns], zero + move


def _int4_grid(weight: PackedWeight, codes: Tensor, zero: Tensor, group: int, centre: int) -> tuple[Tensor, Tensor]:
    """s and z of ``(q - centre) * s + z``, each (in / group, out) float32, s a bfloat16 in value.

    The rounding of s makes a weight wrong by ``(q - middle) * (s - scale)``. The middle is the mean of a group's codes:
    otherwise activations of one sign would add up an error of one sign.
    """
    columns = torch.arange(0, weight.shape[1], group) // weight.group
    rows = weight.shape[0]
    scale, zero = (grid.float().expand(rows, -1)[:, columns] for grid in (weight.scale, zero))
    rounded = scale.bfloat16().float()
    middle = _means(codes, group)
    shift = (centre - middle) * rounded + (middle - zero) * scale
    if weight.offset is not None:
        shift = shift + weight.offset.float().expand(rows, -1)[:, columns]
    return rounded.t(), shift.t()


def _means(codes: Tensor, group: int) -> Tensor:
    """The mean of each group of `group` codes, (out, in / group) float32."""
    return codes.view(codes.shape[0], -1, group).float().mean(-1)
