"""CPU backends by torch's own operators for integers, for few rows of x; CpuCompiled takes more.

For inference: the operators have no derivative.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cpu_compiled import CpuCompiled
from .reference import codes_of, scale_of
from .weight import Facts, PackedWeight, bits_of, integer_levels

_int4_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_int4_linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_int8_linear = torch.ops.aten._weight_int8pack_mm.default

# Rows of x up to which an operator beats the compiled loops. The operators go by four rows at a time, hence multiples.
ROWS_INT4 = ROWS_INT8 = 8
# The same against a decoded weight that is kept.
ROWS_INT4_KEPT = ROWS_INT8_KEPT = 4


class FewRows(CpuCompiled):
    """A backend with an operator for few rows of x, bfloat16 only; CpuCompiled takes more than `limit` rows."""

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
