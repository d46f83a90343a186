"""Integers of 2 to 8 bits with a scale per group, row or tensor.

Five conventions, with N = 2**(bits - 1) and Q = N - 1:

    sym_full    codes -N..N-1    x = q * s        s = -m / N, m the signed element of largest magnitude; the default
    sym         codes -Q..Q      x = q * s        s = max|x| / Q
    sym_gptq    codes 0..2N-1    x = (q - N) * s  s = 2 max|x| / (2N - 1), as GPTQ and compressed-tensors pick it
    asym        codes 0..2N-1    x = (q - z) * s  s = (max(x, 0) - min(x, 0)) / (2N - 1), z an integer code
    asym_float  codes 0..2N-1    x = q * s + z    s = (max x - min x) / (2N - 1), z = min x, a real number

The scale is rounded to its stored type first, and codes are found with the rounded scale: x / s in float32, to the
nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import PlanError
from llmquant.formats import clipping, options, packing
from llmquant.formats.base import Granularity, Grid, Lattice, TensorSpec
from llmquant.formats.elements import Whole
from llmquant.formats.scalar import Found, Scalar

CONVENTIONS = ("sym_full", "sym", "sym_gptq", "asym", "asym_float")

SYMMETRIC_FACTORS = [i / 100 for i in range(40, 116)]
ASYMMETRIC_FACTORS = [1 - i / 100 for i in range(80)]
# Every fifth factor, then the eight around the best: 24 instead of 76 trials. On trained and on random weights the
# squared error is at most 0.04 % above that of all of them at 2 to 4 bits, 0.4 % at 8.
STRIDE = 5


@dataclass(frozen=True)
class Integer(Scalar):
    """b-bit integers; see the module docstring for the conventions.

    scale_dtype None: float16, or bfloat16 for a bfloat16 weight (what compressed-tensors expects to find).
    """

    bits: int
    granularity: Granularity = 128
    convention: str = "sym_full"
    scale_dtype: torch.dtype | None = None
    clip_modes = ("search", "minmax", "mse", "percentile", "kl")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(f"int{self.bits}: integers have 2 to 8 bits")
        super().__post_init__()

    @property
    def spec(self) -> str:
        convention = None if self.convention == "sym_full" else self.convention
        return options.spec(f"int{self.bits}", self.granularity, convention, self.scale_dtype)

    @property
    def compressed_tensors(self) -> str | None:
        return None if self.convention == "asym_float" else "pack-quantized"

    # ---- what a code means

    @property
    def element(self) -> Whole:
        half = 2 ** (self.bits - 1)
        if self._signed:
            return Whole(self.bits, -half + (1 if self.convention == "sym" else 0), half - 1, "offset")
        return Whole(self.bits, 0, 2 * half - 1, "unsigned")

    @property
    def _signed(self) -> bool:
        return self.convention in ("sym", "sym_full")

    @property
    def _has_zero(self) -> bool:  # type: ignore[override]
        return not self._signed

    @property
    def _middle(self) -> int:
        """What is added to a signed code to store it, and the constant zero point of sym_gptq."""
        return int(2 ** (self.bits - 1))

    def _levels(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Range (rows, groups) -> stored scale and zero; a scale that overflows is not finite."""
        top = self.element.highest
        low, high = low.double(), high.double()  # so that the stored scale is the exact quotient, rounded once
        if self.convention == "asym":
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = self._store((high - low) / top)
            return scale, torch.round(-low / scale).clamp(0, top).float().abs()  # abs: no negative zero
        if self.convention == "asym_float":
            return self._store((high - low) / top), low.to(self._stored_scale).float()
        if self.convention == "sym_full":
            return self._store(torch.where(high >= -low, high, low) / self.element.lowest), None
        reach = torch.maximum(high, -low)
        if self.convention == "sym":
            return self._store(reach / top), None
        scale = self._store(2 * reach / top)
        return scale, torch.full_like(scale, self._middle)

    def _steps(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes as float32, in a fresh tensor. scale and zero broadcast against x."""
        if self.convention == "asym_float":
            assert zero is not None
            return (x - zero).div_(scale).round_().clamp_(0, self.element.highest)
        steps = (x / scale).round_()
        if zero is not None:
            steps.add_(zero)
        return steps.clamp_(self.element.lowest, self.element.highest)

    def _values(self, steps: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes stand for; may overwrite steps."""
        if self.convention == "asym_float":
            assert zero is not None  # float64: the terms may cancel
            return torch.addcmul(zero.double(), steps.double(), scale.double()).float()
        return (steps if zero is None else steps.sub_(zero)).mul_(scale)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self._steps(x, scale, zero).to(self.element.code_dtype)

    def lattice(self, grid: Grid) -> Lattice:
        lattice = super().lattice(grid)
        return replace(lattice, zero=None, offset=grid.zero) if self.convention == "asym_float" else lattice

    def moved(
        self, grid: Grid, *, scale: Tensor | None = None, zero: Tensor | None = None, levels: Tensor | None = None
    ) -> Grid:
        grid = super().moved(grid, scale=scale)
        if zero is not None and self.convention == "asym":
            return replace(grid, zero=zero.round().clamp(0, self.element.highest))
        if zero is not None and self.convention == "asym_float":
            return replace(grid, zero=zero.to(self._stored_scale).float())
        return grid

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search", norm: float = 2.0) -> Grid:
        """See Format.fit. clip: how far the grid reaches.

        search      0.40..1.15 times the range (symmetric; both signs of the scale up to 3 bits) or 0.21..1.00 times,
                    whichever loses least, weighted by importance, then refined by weighted least squares
        mse         the factor of 1.00, 0.99 .. 0.21 with the least sum of |error|**norm, unweighted (as in GPTQ)
        minmax      the whole range;  percentile: the central 99.9 %;  kl: the range nearest by KL of histograms
        """
        return self._fit(w, importance, clip, partial(self._fit_groups, clip=clip, norm=norm))

    def _fit_groups(
        self, x: Tensor, importance: Tensor | None, clip: str, norm: float = 2.0
    ) -> tuple[Tensor, Tensor | None]:
        if clip == "percentile":
            return self._levels(*clipping.percentile(x))
        if clip == "kl":
            return self._levels(*clipping.kl(x, self._middle))
        low, high = clipping.minmax(x)
        if clip == "minmax":
            return self._levels(low, high)
        if clip == "mse":
            levels = self._stretched(low, high)
            return clipping.search(x, None, levels, ASYMMETRIC_FACTORS, self._error, norm=norm)[:2]
        return self._searched(x, importance, self._searches(low, high), STRIDE)

    def _searches(self, low: Tensor, high: Tensor) -> list[tuple[clipping.Levels, list[float]]]:
        """The families of grids that are searched for a range (rows, groups), and the factors to try."""
        if self.convention not in ("asym", "asym_float"):
            scale, zero = self._levels(low, high)
            searches: list[tuple[clipping.Levels, list[float]]] = [
                (lambda factor: (self._store(factor * scale), zero), SYMMETRIC_FACTORS)
            ]
            if self.convention == "sym_full" and self.bits <= 3:  # few codes: which end has one more matters
                searches.append((lambda factor: (self._store(-factor * scale), zero), SYMMETRIC_FACTORS))
            return searches
        searches = [(self._stretched(low, high), ASYMMETRIC_FACTORS)]
        if self.convention == "asym" and self.bits <= 2:  # with four codes the zero point is worth trials of its own
            searches += [(self._stretched(low, high, round), ASYMMETRIC_FACTORS) for round in (torch.floor, torch.ceil)]
        return searches

    def _stretched(
        self, low: Tensor, high: Tensor, rounding: Callable[[Tensor], Tensor] | None = None
    ) -> clipping.Levels:
        """factor -> the grid of the range times factor. rounding: another one for the zero point of `asym`."""

        def levels(factor: float | Tensor) -> tuple[Tensor, Tensor | None]:
            if self.convention == "asym_float":  # the range need not hold zero: stretch it about its middle
                middle, half = (low + high) / 2, (high - low) / 2
                return self._levels(middle - factor * half, middle + factor * half)
            scale, zero = self._levels(factor * low, factor * high)
            if rounding is not None:
                zero = rounding(factor * low.clamp(max=0).abs() / scale).clamp(0, self.element.highest)
            return scale, zero

        return levels

    def _refined(self, x: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor | None) -> Found:
        if self.convention != "asym_float":
            return super()._refined(x, importance, scale, zero)
        steps = self._steps(x, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1))
        slope, zero = self._regression(x, steps, torch.ones_like(x[:1, :1]) if importance is None else importance)
        slope = self._store(torch.where(torch.isfinite(slope), slope, scale))
        return slope, zero, clipping.weighted_loss(self._error(x, slope, zero), importance)

    def _regression(self, x: Tensor, steps: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted least squares of x on steps with an intercept, per group."""
        total = (h.expand_as(x)).sum(-1)
        mean_x, mean_q = (h * x).sum(-1) / total, (h * steps).sum(-1) / total
        centred = steps - mean_q.unsqueeze(-1)
        slope = (h * centred * x).sum(-1) / (h * centred * centred).sum(-1)
        return slope, torch.nan_to_num(mean_x - slope * mean_q).to(self._stored_scale).float()

    # ---- the file

    def _codes_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        words = packing.words_per_row(self._stored_columns(shape[1]), self.bits)
        return {"weight_packed": TensorSpec((shape[0], words), torch.int32)}

    def _shape_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"weight_shape": TensorSpec((2,), torch.int64)}

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        specs = super()._grid_layout(shape)
        if self.convention == "asym":  # packed along the rows
            rows, groups = (1, 1) if self.granularity == "tensor" else self._scale_shape(shape)
            words = packing.words_per_row(rows, self.bits)
            specs["weight_zero_point"] = TensorSpec((words, groups), torch.int32)
        elif self.convention == "asym_float":
            specs["weight_zero_point"] = specs["weight_scale"]
        return specs

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": packing.pack_words(self.element.stored(codes), self.bits)}

    def _unpack_codes(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return self.element.unstored(packing.unpack_words(named["weight_packed"], self.bits, shape[1]))

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        named = super()._pack_grid(grid, shape)
        if self.convention == "asym":
            assert grid.zero is not None
            named["weight_zero_point"] = packing.pack_words(grid.zero.T.to(torch.uint8), self.bits).T.contiguous()
        elif self.convention == "asym_float":
            assert grid.zero is not None
            named["weight_zero_point"] = grid.zero.to(self._stored_scale).view(named["weight_scale"].shape)
        return named

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        grid = super()._unpack_grid(named, shape)
        return replace(grid, zero=self._unpack_zero(named, grid.scale))

    def _unpack_zero(self, named: dict[str, Tensor], scale: Tensor) -> Tensor | None:
        if self._signed:
            return None
        if self.convention == "sym_gptq":
            return torch.full_like(scale, self._middle)
        stored = named["weight_zero_point"]
        if self.convention == "asym_float":
            return stored.float().view_as(scale)
        return packing.unpack_words(stored.T, self.bits, scale.shape[0]).T.float()

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        fields = {**super()._kernel_grid(named, shape), "levels": None, "zero": self._middle}
        if self.convention == "asym":
            rows = fields["scale"].shape[0]
            zero = packing.unpack_words(named["weight_zero_point"].T, self.bits, rows)
            fields["zero"] = zero.T.contiguous()
        elif self.convention == "asym_float":
            fields |= {"zero": 0, "offset": self._two_dimensional(named["weight_zero_point"])}
        return fields


def parse(name: str, tokens: list[str]) -> Integer:
    """`int4` and the tokens after it: g128 | channel | tensor, a convention, fp16 | bf16 | fp32."""
    conventions = {word: {"convention": word} for word in CONVENTIONS}
    words = (options.granularities("channel", "tensor"), conventions, options.scale_types())
    return Integer(int(name.removeprefix("int")), **options.read(name, tokens, *words))
