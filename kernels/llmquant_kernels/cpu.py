"""CPU backends: torch's operators for few rows of x where they apply, otherwise decoding in blocks of rows.

For inference: the operators have no derivative.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .reference import codes_of, decode, of_rows, scale_of, unpack_trits
from .weight import DTYPES, Facts, PackedWeight, Prepared, bits_of, integer_levels

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
ROWS_PAIR = 16
# Codes that straddle bytes, and digits of base 3, take two to three times as long to decode.
ROWS_MORE_WHERE_DECODING_IS_SLOW = 2
# The same against a decoded weight that is kept: the last line.
ROWS_INT4_KEPT = ROWS_INT8_KEPT = 4
ROWS_PAIR_KEPT = 1
# Weights decoded at a time. Fewer stay in a smaller cache but pay for more calls: 2**18 takes a third longer in all.
BLOCK = 2**21
# Codes that a table decodes at once, by their bits. 16 bits of an index take half the time of 8, but half a megabyte.
CODES_PER_ENTRY = {1: 8, 2: 4, 3: 4, 4: 4, 5: 2, 6: 2, 7: 2, 8: 2}
CODES_PER_ENTRY_OF_ROW = {1: 8, 2: 4, 3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}  # each row has a table, built in each call
# The dtype that moves so many bytes as one element.
ENTRIES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


class CpuDecode(Prepared):
    """Decodes a block of rows at a time and multiplies by it, so that the dense weight never exists as a whole.

    Several codes at once are looked up in a table of their levels, of at most 1 MB, which weights of the same levels
    share. Holds the PackedWeight; with `keep_decoded` the decoded weight too.
    """

    name = "cpu_decode"

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype)
        self.weight = weight
        columns, bits, levels = weight.shape[1], weight.bits, weight.levels
        # Integers of 8 bits are levels as they lie there, and digits are when they are unpacked.
        self.direct = weight.trits or (bits == 8 and levels is None)
        # Where each row has levels of its own, its one scale goes into its table.
        self.folded = levels is not None and levels.dim() == 2
        exact = levels is None or self.folded or _is_exact(levels, dtype)
        self.levels_dtype = dtype if exact else torch.float32
        self.per_entry = (CODES_PER_ENTRY_OF_ROW if self.folded else CODES_PER_ENTRY)[bits]
        self.fast = self.direct or (
            columns % self.per_entry == 0 and self.per_entry * self.levels_dtype.itemsize in ENTRIES
        )
        self.fast &= weight.groups == 1 or (not self.folded and columns % weight.group == 0)
        self.fast &= weight.micro is None or (not self.folded and columns % 16 == 0)
        self.table: Table | None = None
        if self.fast and not self.direct and not self.folded:
            own = _integers_of(bits, weight.signed) if levels is None else levels
            self.table = _shared_table(own, bits, self.per_entry, self.levels_dtype)
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
        if not self.fast:
            return decode(weight, self.dtype, start, stop)
        scale = scale_of(weight, start, stop)
        shift = -(of_rows(weight.zero, start, stop) if isinstance(weight.zero, Tensor) else weight.zero) * scale
        if weight.offset is not None:
            shift = shift + of_rows(weight.offset, start, stop)
        if self.folded:
            assert weight.levels is not None
            values = weight.levels[start:stop].float() * scale.squeeze(-1) + shift.squeeze(-1)
            table = Table.of(values, weight.bits, self.per_entry, self.dtype)
            return table.look_up(weight.packed[start:stop], self.shape[1])
        levels = self.levels(start, stop)
        if weight.micro is not None:
            levels *= _halves(weight.micro[start:stop], self.shape[1], levels.dtype)
        return _affine(levels.view(stop - start, weight.groups, -1), scale, shift).view(stop - start, -1).to(self.dtype)

    def levels(self, start: int, stop: int) -> Tensor:
        """Levels of rows [start, stop), (rows, in) of levels_dtype."""
        packed, columns = self.weight.packed[start:stop], self.shape[1]
        if self.table is not None:
            return self.table.look_up(packed, columns)
        if self.weight.trits:
            codes = unpack_trits(packed, columns)
        else:
            codes = packed.view(torch.int8 if self.weight.signed else torch.uint8)[:, :columns]
        return codes.to(self.dtype, memory_format=torch.contiguous_format)


class Table(NamedTuple):
    """For every sequence of `per_entry` codes, lowest first, their levels side by side in one wide element."""

    entries: Tensor  # (2**(bits * per_entry),), or as many for each row, one after the other
    bits: int
    per_entry: int
    dtype: torch.dtype
    per_row: bool

    @classmethod
    def of(cls, levels: Tensor, bits: int, per_entry: int, dtype: torch.dtype) -> Table:
        """Levels (2**bits,), or (rows, 2**bits)."""
        index = torch.arange(2 ** (bits * per_entry))
        codes = torch.stack([index >> i * bits & 2**bits - 1 for i in range(per_entry)], dim=1)
        entries = levels.to(dtype)[..., codes].view(ENTRIES[per_entry * dtype.itemsize]).flatten()
        return cls(entries, bits, per_entry, dtype, levels.dim() == 2)

    def look_up(self, packed: Tensor, columns: int) -> Tensor:
        """Levels (rows, columns) of the bit streams `packed` (rows, words or bytes)."""
        rows = packed.shape[0]
        index = _entries(packed, self.bits * self.per_entry, columns // self.per_entry).int()
        if self.per_row:
            index += torch.arange(0, len(self.entries), len(self.entries) // rows, dtype=torch.int32).unsqueeze(1)
        return self.entries.index_select(0, index.flatten()).view(self.dtype).view(rows, columns)


def _shared_table(levels: Tensor, bits: int, per_entry: int, dtype: torch.dtype) -> Table:
    """The one table of such levels (2**bits,)."""
    return _table_of(tuple(levels.float().view(torch.int32).tolist()), bits, per_entry, dtype)


@lru_cache(maxsize=16)
def _table_of(levels: tuple[int, ...], bits: int, per_entry: int, dtype: torch.dtype) -> Table:
    """Levels as the bits of float32: among these, NaN equals itself."""
    return Table.of(torch.tensor(levels, dtype=torch.int32).view(torch.float32), bits, per_entry, dtype)


def _integers_of(bits: int, signed: bool) -> Tensor:
    """What codes without levels stand for, (2**bits,)."""
    codes, sign = torch.arange(2**bits), 2 ** (bits - 1)
    return (codes ^ sign) - sign if signed else codes


def _is_exact(levels: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds all levels; one that it does not must wait for its rounding until it is scaled."""
    levels = levels.float()
    return not bool(((levels.to(dtype) != levels) & ~levels.isnan()).any())


def _halves(micro: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What micro-exponents (rows, bytes) multiply levels by, (rows, columns); columns is a multiple of 16."""
    bits = 8 // dtype.itemsize  # two columns a bit: as many as fit the widest element
    index = torch.arange(2**bits)
    halved = torch.stack([index >> i & 1 for i in range(bits)], dim=1).repeat_interleave(2, dim=1)
    table = (1 - 0.5 * halved).to(dtype).view(ENTRIES[16]).flatten()
    entries = _entries(micro, bits, columns // (2 * bits)).int()
    return table.index_select(0, entries.flatten()).view(dtype).view(-1, columns)


def _entries(packed: Tensor, width: int, count: int) -> Tensor:
    """The bit streams (rows, words or bytes) cut into `count` unsigned integers of `width` bits, (rows, count)."""
    data = packed.view(torch.uint8)
    if width == 8:
        return data[:, :count]
    if width == 16 and data.stride(0) % 2 == 0 and data.storage_offset() % 2 == 0:
        return data[:, : 2 * count].view(torch.int16).int().bitwise_and_(0xFFFF)
    run = 8 // gcd(width, 8)  # integers that fill whole bytes
    size = run * width // 8
    filled = -(-count // run) * size
    data = functional.pad(data, (0, max(0, filled - data.shape[1])))[:, :filled].unflatten(1, (-1, size))
    # Bytes apart and wide, for all the shifting to be of what lies side by side: half the time.
    planes = [data[..., i].int() for i in range(size)]
    entries = torch.empty(*planes[0].shape, run, dtype=torch.int32)
    for i in range(run):
        byte, shift = divmod(i * width, 8)
        entry = planes[byte] >> shift
        for place in range(8 - shift, width, 8):
            byte += 1
            entry |= planes[byte] << place
        torch.bitwise_and(entry, 2**width - 1, out=entries[..., i])
    return entries.flatten(1)[:, :count]


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
        elif 8 % weight.bits or weight.trits:
            self.limit *= ROWS_MORE_WHERE_DECODING_IS_SLOW

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if reason := super().refuses(facts, dtype):
            return reason
        if dtype != torch.bfloat16:
            return f"the operator is fast for bfloat16 activations only, not {dtype}"
        if facts.has_levels and facts.integer_bits is None:
            return "the operator knows integers, not tables of levels"
        if facts.has_levels and facts.zero != 0:
            return "the operator knows integers, not tables of levels less a zero point"
        if facts.has_micro:
            return "the operator knows no micro-exponents"
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
        integers = _integers(weight).moved(8, 15)
        self.codes = _int4_pack(integers.codes, 1)
        self.grid = torch.stack(integers.grid(self.group, 8), dim=-1).bfloat16()

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if reason := super().refuses(facts, dtype):
            return reason
        bits = facts.integer_bits or facts.bits
        if bits not in cls.bits:
            return f"takes {cls.bits[0]} to {cls.bits[-1]} bits, not {bits}"
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
        integers = _integers(weight)
        self.codes = (integers.codes - integers.zero).to(torch.int8, memory_format=torch.contiguous_format)
        self.scale = integers.scale.flatten().to(dtype)

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
        first = -(2 ** (facts.bits - 1)) if facts.signed else 0
        if not facts.has_levels and not first + 2**facts.bits - 128 <= facts.zero <= first + 128:
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
        integers = _integers(weight).moved(136, 255)
        low = integers.codes & 15
        self.codes, self.high = _int4_pack(low, 1), _int4_pack(integers.codes >> 4, 1)
        scale, shift = integers.grid(self.group, 136)
        low_shift = (8 - _means(low, self.group)).t() * scale
        high_shift = (shift - low_shift).bfloat16().float()
        self.grid = torch.stack([scale, shift - high_shift], dim=-1).bfloat16()
        self.high_grid = torch.stack([scale * 16, high_shift], dim=-1).bfloat16()

    def few(self, x: Tensor) -> Tensor:
        return super().few(x).add_(_int4_linear(x, self.high, self.group, self.high_grid))


def _int4_group(columns: int, group: int) -> int:
    """The largest group of the int4 operator that divides both, 0 where none does."""
    return next((g for g in (256, 128, 64, 32) if columns % g == 0 and (group % g == 0 or group >= columns)), 0)


@dataclass(frozen=True)
class Integers:
    """What an operator for integers can take, however it is stored: (codes - zero) * scale + offset."""

    codes: Tensor  # (out, in) int32, 0 to 2**bits - 1
    bits: int
    group: int
    zero: Tensor  # (out or 1, groups) int32
    scale: Tensor  # (out, groups) float32
    offset: Tensor | None  # (out or 1, groups)

    def moved(self, centre: int, top: int) -> Integers:
        """The same with codes moved together with their zeros, so that these come near to `centre`.

        As far as codes stay within 0 and `top`. A zero at the centre needs no z, which would be rounded.
        """
        move = (centre - self.zero).clamp(0, top + 1 - 2**self.bits)
        columns = torch.arange(self.codes.shape[1]) // self.group
        return replace(self, codes=self.codes + move[:, columns], zero=self.zero + move)

    def grid(self, group: int, centre: int) -> tuple[Tensor, Tensor]:
        """s and z of ``(q - centre) * s + z``, each (in / group, out) float32, s a bfloat16 in value.

        The rounding of s makes a weight wrong by ``(q - middle) * (s - scale)``. The middle is the mean of a group's
        codes: otherwise activations of one sign would add up an error of one sign.
        """
        rows, columns = self.codes.shape
        own = torch.arange(0, columns, group) // self.group
        scale, zero = self.scale[:, own], self.zero.float().expand(rows, -1)[:, own]
        rounded = scale.bfloat16().float()
        middle = _means(self.codes, group)
        shift = (centre - middle) * rounded + (middle - zero) * scale
        if self.offset is not None:
            shift = shift + self.offset.float().expand(rows, -1)[:, own]
        return rounded.t(), shift.t()


def _integers(weight: PackedWeight) -> Integers:
    """The weight as integers; see refuses for which weights are."""
    codes, bits = codes_of(weight).int(), weight.bits
    zero = weight.zero if isinstance(weight.zero, Tensor) else torch.tensor([[weight.zero]]).expand(1, weight.groups)
    zero = zero.int()
    scale = scale_of(weight).squeeze(-1).expand(weight.shape[0], -1)
    if weight.signed:
        middle = 2 ** (bits - 1)
        codes, zero = codes ^ middle, zero + middle
    if weight.levels is not None:
        found = integer_levels(weight.levels)
        assert found is not None
        levels, exponent = found
        least = levels.min()
        codes, bits = (levels - least).int()[codes], bits_of(levels)
        zero, scale = zero - least, scale * 2.0**-exponent
    return Integers(codes, bits, weight.group, zero, scale, weight.offset)


def _means(codes: Tensor, group: int) -> Tensor:
    """The mean of each group of `group` codes, (out, in / group) float32."""
    return codes.view(codes.shape[0], -1, group).float().mean(-1)
