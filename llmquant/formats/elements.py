"""What one code stands for before it is scaled: small floats, integers, and tables of levels.

An Element rounds to its nearest level and turns levels into codes and back. It knows neither groups nor scales; the
formats do. Rounding is to nearest; ties go to the even code, in tables to the lower level.

Sources: OCP Microscaling Formats (MX) v1.0, section 5.3 (e4m3, e5m2, e3m2, e2m3, e2m1, int8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EXPONENT_BITS = 0x7F800000  # of a float32
BUCKETS = 4096  # of a table's lookup


class Element(ABC):
    """The levels of `bits` bits. Results are fresh tensors of the argument's shape and device."""

    bits: int
    code_dtype: torch.dtype
    largest: float  # the largest magnitude of a level
    cast: torch.dtype | None = None  # torch's own type of the same bits

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """The level nearest to each x float32, as float32. The sign of a zero is undefined."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """The code of the level nearest to each x float32, in code_dtype."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """The levels, float32, that codes stand for."""

    @abstractmethod
    def all_codes(self) -> Tensor:
        """Every code that is ever written."""

    def stored(self, codes: Tensor) -> Tensor:
        """Codes as the file has them: unsigned, of `bits` bits, uint8."""
        return codes

    def unstored(self, stored: Tensor) -> Tensor:
        """The inverse of `stored`."""
        return stored

    def table(self) -> Tensor:
        """(2**bits,) float32: the level of every stored code; NaN for those that are never written."""
        return self.levels(self.unstored(torch.arange(2**self.bits, dtype=torch.uint8)))


@dataclass(frozen=True)
class Float(Element):
    """sign | exponent | mantissa, with subnormals: (-1)**s * 2**(e - bias) * (1 + m / 2**mantissa).

    Codes are bit patterns, uint8. Values beyond the largest level become it; a negative x that rounds to zero keeps its
    sign, as in the casts of torch and of the hardware.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    cast: torch.dtype | None = None
    code_dtype = torch.uint8

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent + self.mantissa

    def round(self, x: Tensor) -> Tensor:
        x = x.clamp(-self.largest, self.largest)
        # Adding 1.5 * 2**23 times the distance of two levels pushes what is smaller than it out of the float32.
        push = x.view(torch.int32).bitwise_and(EXPONENT_BITS).view(torch.float32)
        push.clamp_min_(2.0 ** (1 - self.bias)).mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return x.add_(push).sub_(push)

    def codes(self, x: Tensor) -> Tensor:
        if self.cast is not None:
            return x.clamp(-self.largest, self.largest).to(self.cast).view(torch.uint8)
        # Every level is a multiple of the smallest: that multiple tells its code.
        smallest = 2.0 ** (1 - self.bias - self.mantissa)
        multiples = self.round(x).abs_().mul_(1 / smallest).int()
        codes = _looked_up(self._codes_of_multiples.to(x.device), multiples)
        sign = x.contiguous().view(torch.int32).bitwise_right_shift(31).bitwise_and_(1 << self.bits - 1)
        return codes.bitwise_or_(sign.to(torch.uint8))

    def levels(self, codes: Tensor) -> Tensor:
        return _looked_up(self._levels.to(codes.device), codes)

    def all_codes(self) -> Tensor:
        return torch.arange(2**self.bits, dtype=torch.uint8)[self._levels.isfinite()]

    @cached_property
    def _levels(self) -> Tensor:
        code = torch.arange(2**self.bits)
        exponent = code >> self.mantissa & 2**self.exponent - 1
        mantissa = (code & 2**self.mantissa - 1) / 2**self.mantissa
        value = torch.where(exponent > 0, 1 + mantissa, mantissa) * 2.0 ** (exponent.clamp_min(1) - self.bias)
        value = torch.where(value > self.largest, torch.nan, value)  # infinities and NaN of e5m2 and e4m3
        return torch.where(code >> self.bits - 1 > 0, -value, value)

    @cached_property
    def _codes_of_multiples(self) -> Tensor:
        levels = self._levels[: 2 ** (self.bits - 1)]
        multiples = (levels / levels[1]).long()
        codes = torch.zeros(int(multiples[-1]) + 1, dtype=torch.uint8)
        codes[multiples] = torch.arange(len(levels), dtype=torch.uint8)
        return codes


E4M3 = Float("e4m3", 4, 3, 7, 448.0, torch.float8_e4m3fn)
E5M2 = Float("e5m2", 5, 2, 15, 57344.0, torch.float8_e5m2)
E3M2 = Float("e3m2", 3, 2, 3, 28.0)
E2M3 = Float("e2m3", 2, 3, 1, 7.5)
E2M1 = Float("e2m1", 2, 1, 1, 6.0)


@dataclass(frozen=True)
class Whole(Element):
    """The integers lowest..highest times `unit`. Codes are these integers, int8 or uint8; there is no negative zero.

    Stored `unsigned`, as `twos_complement`, as `offset` (2**(bits - 1) is added), or as `sign_magnitude` (the sign bit
    above the magnitude).
    """

    bits: int
    lowest: int
    highest: int
    storage: str
    unit: float = 1.0

    @property
    def code_dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.uint8 if self.storage == "unsigned" else torch.int8

    @property
    def largest(self) -> float:  # type: ignore[override]
        return max(-self.lowest, self.highest) * self.unit

    def round(self, x: Tensor) -> Tensor:
        if self.unit == 1.0:
            return x.round().clamp_(self.lowest, self.highest)
        return x.mul(1 / self.unit).round_().clamp_(self.lowest, self.highest).mul_(self.unit)

    def codes(self, x: Tensor) -> Tensor:
        return x.mul(1 / self.unit).round_().clamp_(self.lowest, self.highest).to(self.code_dtype)

    def levels(self, codes: Tensor) -> Tensor:
        return codes.float().mul_(self.unit)

    def all_codes(self) -> Tensor:
        return torch.arange(self.lowest, self.highest + 1, dtype=self.code_dtype)

    def stored(self, codes: Tensor) -> Tensor:
        if self.storage == "unsigned":
            return codes
        if self.storage == "sign_magnitude":
            return codes.abs().bitwise_or_(codes & -(2 ** (self.bits - 1))).view(torch.uint8) & 2**self.bits - 1
        moved = codes + 2 ** (self.bits - 1) if self.storage == "offset" else codes  # int8 wraps
        return moved.view(torch.uint8) & (2**self.bits - 1)

    def unstored(self, stored: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        if self.storage == "unsigned":
            return stored
        if self.storage == "sign_magnitude":
            sign = -(stored >> self.bits - 1).view(torch.int8)  # 0 or -1
            return (stored & half - 1).view(torch.int8).bitwise_xor_(sign).sub_(sign)
        moved = stored if self.storage == "offset" else stored ^ half
        return (moved - half).view(torch.int8)  # uint8 wraps to the two's complement


@dataclass(frozen=True)
class Table(Element):
    """Any levels, ascending. A code is the place in the table, uint8; a tie goes to the lower level."""

    values: tuple[float, ...]
    code_dtype = torch.uint8

    @property
    def bits(self) -> int:  # type: ignore[override]
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def largest(self) -> float:  # type: ignore[override]
        return max(-self.values[0], self.values[-1])

    def round(self, x: Tensor) -> Tensor:
        return self.levels(self.codes(x))

    def codes(self, x: Tensor) -> Tensor:
        """How many middles between two levels lie strictly below x.

        Found in the lookup of its bucket, and by comparing with the middles inside that bucket: seven times as fast as
        torch.bucketize, and as exact.
        """
        buckets = _buckets(x, *self._span)
        below, inside = (table.to(x.device) for table in self._lookup)
        codes = _looked_up(below, buckets)
        for middles in inside:
            codes.add_(_looked_up(middles, buckets) < x)
        return codes

    def levels(self, codes: Tensor) -> Tensor:
        return _looked_up(self.table().to(codes.device), codes)

    def all_codes(self) -> Tensor:
        return torch.arange(len(self.values), dtype=torch.uint8)

    def table(self) -> Tensor:
        """The last level for codes that are never written, but that a damaged file may hold."""
        return torch.nn.functional.pad(self._values, (0, 2**self.bits - len(self.values)), value=self.values[-1])

    @cached_property
    def _values(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32)

    @cached_property
    def _span(self) -> tuple[float, float]:
        """Where buckets begin, and how many there are to the unit."""
        return self.values[0], BUCKETS / max(self.values[-1] - self.values[0], 1e-30)

    @cached_property
    def _lookup(self) -> tuple[Tensor, Tensor]:
        """(BUCKETS,) middles in the buckets below each, and (most in one, BUCKETS) those inside, filled with inf."""
        middles = (self._values.double()[1:] + self._values.double()[:-1]).div(2).float()
        place = _buckets(middles, *self._span).long()
        counts = torch.bincount(place, minlength=BUCKETS)
        inside = torch.full((max(1, int(counts.max())), BUCKETS), torch.inf)
        for index, bucket in enumerate(place.tolist()):
            inside[index - int((place < bucket).sum()), bucket] = middles[index]
        return (counts.cumsum(0) - counts).to(torch.uint8), inside


def _buckets(x: Tensor, start: float, per_unit: float) -> Tensor:
    """Rises with x, whatever the rounding: so a middle in a lower bucket than x is below x."""
    return x.sub(start).mul_(per_unit).clamp_(0, BUCKETS - 1).int()


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], by the operator that is seven times as fast as indexing."""
    return table.index_select(0, index.int().reshape(-1)).view(index.shape)
