"""OCP Microscaling (MX): blocks of 32 columns that share a power of two.

    mxfp8_e4m3  mxfp8_e5m2  mxfp6_e3m2  mxfp6_e2m3  mxfp4  mxint8       x = element * 2**e, e stored as the byte e + 127

How e follows from the largest magnitude a of a block, as an option after the name:

    mse     the e of floor, floor + 1, floor - 1 with the least weighted squared error; the default
    floor   floor(log2 a) - floor(log2 largest level): the rule of the standard, which lets a clip
    rceil   the smallest e with which a does not clip
    even    floor, after rounding a to the element's mantissa

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6.3. The tensors and bytes of mxfp8_e4m3,
mxfp6_e2m3 and mxfp4 are those of compressed-tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import options
from llmquant.formats.base import Grid
from llmquant.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, Element, Float, Whole
from llmquant.formats.scalar import Scalar

BLOCK = 32
BIAS = 127
ELEMENTS: dict[str, Element] = {
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxfp6_e3m2": E3M2,
    "mxfp6_e2m3": E2M3,
    "mxfp4": E2M1,
    "mxint8": Whole(8, -127, 127, "twos_complement", unit=1 / 64),
}
COMPRESSED_TENSORS = {
    "mxfp8_e4m3": "mxfp8-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}
MODES = ("mse", "floor", "rceil", "even")


@dataclass(frozen=True)
class MX(Scalar):
    """name: a key of ELEMENTS; mode: how a block's exponent is found. clip `minmax` stands for `floor`."""

    name: str
    mode: str = "mse"
    granularity = BLOCK
    fixed_group = True
    scale_dtype = torch.uint8

    @property
    def spec(self) -> str:
        return options.spec(self.name, None if self.mode == "mse" else self.mode)

    @property
    def compressed_tensors(self) -> str | None:
        return COMPRESSED_TENSORS.get(self.name)

    @property
    def element(self) -> Element:
        return ELEMENTS[self.name]

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        mode = "floor" if clip == "minmax" else self.mode
        largest = x.abs().amax(-1)
        exponent = self._exponent(largest, mode)
        scale = self._power(exponent, largest)
        if mode != "mse":
            return scale, None
        others = (self._power(other, largest) for other in (exponent + 1, exponent - 1))
        return self._least(x, importance, (scale, *others)), None

    def _exponent(self, largest: Tensor, mode: str) -> Tensor:
        """int32; by frexp, because log2 of the float below a power of two rounds up to it."""
        fraction, exponent = torch.frexp(largest)
        fraction, exponent = 2 * fraction, exponent - 1  # fraction in [1, 2)
        top_fraction, top_exponent = torch.frexp(torch.tensor(self.element.largest))
        if mode == "even":
            mantissa = self.element.mantissa if isinstance(self.element, Float) else self.element.bits - 2
            exponent = exponent + (torch.floor(fraction * 2**mantissa + 0.5) >= 2 ** (mantissa + 1)).int()
        elif mode == "rceil":
            exponent = exponent + (fraction > 2 * top_fraction).int()
        return exponent - (top_exponent - 1)

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        fraction, exponent = torch.frexp(scale.abs())  # the fraction is in [1/2, 1)
        return self._power(exponent - 1 + (fraction > 2**-0.5).int(), scale)

    def alternative(self, grid: Grid, which: int) -> tuple[int, Tensor] | None:
        """One exponent up, one down."""
        if which > 1:
            return None
        byte = encode_exponent(grid.scale).int() + (1 if which == 0 else -1)
        return BLOCK, decode_exponent(byte.clamp(0, 2 * BIAS))

    @staticmethod
    def _power(exponent: Tensor, largest: Tensor) -> Tensor:
        byte = torch.where(largest == 0, 0, exponent.clamp(-BIAS, BIAS) + BIAS)
        return decode_exponent(byte)

    # ---- the file

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {"weight_scale": encode_exponent(grid.scale)}

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        return Grid(decode_exponent(named["weight_scale"]), None, BLOCK)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        fields: dict[str, Any] = {"scale": named["weight_scale"].view(torch.float8_e8m0fnu)}
        if isinstance(self.element, Whole):
            fields |= {
                "levels": None,
                "signed": True,
                "outer": torch.full((1, 1), self.element.unit, device=fields["scale"].device),
            }
        return fields


def encode_exponent(scale: Tensor) -> Tensor:
    """Powers of two 2**-127..2**127 float32 -> their exponent plus 127, uint8."""
    return scale.contiguous().view(torch.int32).bitwise_right_shift(23).to(torch.uint8)


def decode_exponent(byte: Tensor) -> Tensor:
    """2**(byte - 127) float32; byte 0, a subnormal, included."""
    byte = byte.int()
    return torch.where(byte == 0, 1 << 22, byte << 23).view(torch.float32)


def parse(name: str, tokens: list[str]) -> MX:
    """The name, and one of the modes."""
    modes = {mode: {"mode": mode} for mode in MODES}
    return MX(name, **options.read(name, tokens, modes, groups=False))
