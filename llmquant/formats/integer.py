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

import torch
from torch import Tensor

from llmquant.errors import PlanError, ScaleOverflow
from llmquant.formats import clipping, packing
from llmquant.formats.base import Format, Granularity, Grid, TensorSpec, check_finite
from llmquant_kernels import PackedWeight

CONVENTIONS = ("sym_full", "sym", "sym_gptq", "asym", "asym_float")
CLIP_MODES = ("search", "minmax", "percentile", "mse", "kl")
SCALE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALE_NAMES = {dtype: name for name, dtype in SCALE_TYPES.items()}
# Below this a stored scale is no longer a normal number (fp16: no longer any number) and the group is stored as zeros.
SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}

SYMMETRIC_FACTORS = [i / 100 for i in range(40, 116)]
ASYMMETRIC_FACTORS = [1 - i / 100 for i in range(80)]
# Every fifth factor, then the eight around the best: 24 instead of 76 trials. On trained and on random weights the
# squared error is at most 0.04 % above that of all of them at 2 to 4 bits, 0.4 % at 8.
STRIDE = 5
REFINEMENTS = 2


@dataclass(frozen=True)
class Integer(Format):
    """b-bit integers; see the module docstring for the conventions.

    scale_dtype None: float16, or bfloat16 for a bfloat16 weight (what compressed-tensors expects to find).
    """

    bits: int
    granularity: Granularity = 128
    convention: str = "sym_full"
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(f"int{self.bits}: integers have 2 to 8 bits")
        if isinstance(self.granularity, int) and self.granularity < 1:
            raise PlanError(f"int{self.bits}:g{self.granularity}: a group has at least one column")

    @property
    def spec(self) -> str:
        parts = [f"int{self.bits}", f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity]
        if self.convention != "sym_full":
            parts.append(self.convention)
        if self.scale_dtype is not None:
            parts.append(SCALE_NAMES[self.scale_dtype])
        return ":".join(parts)

    def stored_for(self, dtype: torch.dtype) -> Integer:
        if self.scale_dtype is not None:
            return self
        return replace(self, scale_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)

    # ---- what a code means

    @property
    def _signed(self) -> bool:
        return self.convention in ("sym", "sym_full")

    @property
    def _lowest(self) -> int:
        if not self._signed:
            return 0
        return -(2 ** (self.bits - 1)) + (1 if self.convention == "sym" else 0)

    @property
    def _highest(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self._signed else 2**self.bits - 1

    @property
    def _middle(self) -> int:
        """What is added to a signed code to store it, and the constant zero point of sym_gptq."""
        return int(2 ** (self.bits - 1))

    @property
    def _stored_scale(self) -> torch.dtype:
        return self.scale_dtype or torch.float16

    def _store(self, scale: Tensor) -> Tensor:
        """Rounded to the stored type; scales that vanish there become 1, which turns their group into zeros."""
        stored = scale.to(self._stored_scale).float()
        return torch.where(stored.abs() < SMALLEST_SCALE[self._stored_scale], 1.0, stored)

    def _levels(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Range (rows, groups) -> stored scale and zero; a scale that overflows is not finite."""
        top = self._highest
        low, high = low.double(), high.double()  # so that the stored scale is the exact quotient, rounded once
        if self.convention == "asym":
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = self._store((high - low) / top)
            return scale, torch.round(-low / scale).clamp(0, top).float().abs()  # abs: no negative zero
        if self.convention == "asym_float":
            return self._store((high - low) / top), low.to(self._stored_scale).float()
        if self.convention == "sym_full":
            return self._store(torch.where(high >= -low, high, low) / self._lowest), None
        reach = torch.maximum(high, -low)
        if self.convention == "sym":
            return self._store(reach / top), None
        scale = self._store(2 * reach / top)
        return scale, torch.full_like(scale, self._middle)

    def _steps(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes as float32, in a fresh tensor. scale and zero broadcast against x."""
        if self.convention == "asym_float":
            assert zero is not None
            return (x - zero).div_(scale).round_().clamp_(0, self._highest)
        steps = (x / scale).round_()
        if zero is not None:
            steps.add_(zero)
        return steps.clamp_(self._lowest, self._highest)

    def _values(self, steps: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What codes stand for; may overwrite steps."""
        if self.convention == "asym_float":
            assert zero is not None  # float64: the terms may cancel
            return torch.addcmul(zero.double(), steps.double(), scale.double()).float()
        return (steps if zero is None else steps.sub_(zero)).mul_(scale)

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search", norm: float = 2.0) -> Grid:
        """See Format.fit. clip: how far the grid reaches.

        search      0.40..1.15 times the range (symmetric; both signs of the scale up to 3 bits) or 0.21..1.00 times,
                    whichever loses least, weighted by importance, then refined by weighted least squares
        mse         the factor of 1.00, 0.99 .. 0.21 with the least sum of |error|**norm, unweighted (as in GPTQ)
        minmax      the whole range;  percentile: the central 99.9 %;  kl: the range nearest by KL of histograms
        """
        if clip not in CLIP_MODES:
            raise PlanError(f"clip mode {clip!r} is unknown: choose one of {', '.join(CLIP_MODES)}")
        check_finite(w)
        rows, columns = w.shape
        if self.granularity == "tensor":
            weights = None if importance is None else importance.expand(rows, columns).reshape(1, 1, -1)
            scale, zero = self._fit_groups(w.reshape(1, 1, -1), weights, clip, norm)
            return Grid(self._checked(scale), zero, columns)
        group = self._group(columns)
        empty = partial(torch.empty, rows, -(-columns // group), device=w.device)
        grid = Grid(empty(), None if self._signed else empty(), group)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            weights = None if importance is None else importance[columns].view(1, -1, width)
            found = self._fit_groups(w[rows, columns].unflatten(1, (-1, width)), weights, clip, norm)
            scale.squeeze(-1).copy_(found[0])
            if zero is not None and found[1] is not None:
                zero.squeeze(-1).copy_(found[1])

        grid.visit((rows, columns), run)
        self._checked(grid.scale)
        return grid

    def _checked(self, scale: Tensor) -> Tensor:
        if not torch.isfinite(scale).all():
            row, group = (~torch.isfinite(scale)).nonzero()[0].tolist()
            raise ScaleOverflow(
                f"the scale of row {row}, group {group} does not fit {SCALE_NAMES[self._stored_scale]}: "
                f"store scales as fp32 (format {replace(self, scale_dtype=torch.float32).spec})"
            )
        return scale

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str, norm: float) -> tuple[Tensor, Tensor | None]:
        """x (rows, groups, columns), importance broadcastable to it -> scale, zero (rows, groups)."""
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
        found = [
            clipping.search(x, importance, levels, factors, self._error, stride=STRIDE)
            for levels, factors in self._searches(low, high)
        ]
        scale, zero, loss = found[0]
        for other in found[1:]:
            scale, zero, loss = _better(other, (scale, zero, loss))
        for _ in range(REFINEMENTS):
            scale, zero, loss = _better(self._refined(x, importance, scale, zero), (scale, zero, loss))
        return scale, zero

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
                zero = rounding(factor * low.clamp(max=0).abs() / scale).clamp(0, self._highest)
            return scale, zero

        return levels

    def _error(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        scale, zero = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        return self._values(self._steps(x, scale, zero), scale, zero).sub_(x)

    def _refined(
        self, x: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The least-squares scale (asym_float: scale and zero) for the codes as they are, and its loss."""
        steps = self._steps(x, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1))
        h = torch.ones_like(x[:1, :1]) if importance is None else importance
        if self.convention == "asym_float":
            new_scale, zero = self._regression(x, steps, h)
        else:
            steps = steps if zero is None else steps.sub_(zero.unsqueeze(-1))
            weighted = steps * h
            new_scale = (weighted * x).sum(-1) / (weighted * steps).sum(-1)
        new_scale = self._store(torch.where(torch.isfinite(new_scale), new_scale, scale))
        return new_scale, zero, clipping.weighted_loss(self._error(x, new_scale, zero), importance)

    def _regression(self, x: Tensor, steps: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted least squares of x on steps with an intercept, per group."""
        total = (h.expand_as(x)).sum(-1)
        mean_x, mean_q = (h * x).sum(-1) / total, (h * steps).sum(-1) / total
        centred = steps - mean_q.unsqueeze(-1)
        slope = (h * centred * x).sum(-1) / (h * centred * centred).sum(-1)
        return slope, torch.nan_to_num(mean_x - slope * mean_q).to(self._stored_scale).float()

    # ---- encode and decode

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """int8 for the signed conventions, else uint8."""
        codes = torch.empty(w.shape, dtype=torch.int8 if self._signed else torch.uint8, device=w.device)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            steps = self._steps(w[rows, columns].unflatten(1, (-1, width)), scale, zero)
            codes[rows, columns] = steps.flatten(1).to(codes.dtype)

        grid.visit((w.shape[0], w.shape[1]), run)
        return codes

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        w = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            steps = codes[rows, columns].float().unflatten(1, (-1, width))
            w[rows, columns] = self._values(steps, scale, zero).flatten(1)

        grid.visit((codes.shape[0], codes.shape[1]), run)
        return w

    # ---- the file

    def _group(self, columns: int) -> int:
        """Columns that share a scale."""
        return self.granularity if isinstance(self.granularity, int) else columns

    def _padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(columns stored, groups): a short last group is stored whole."""
        columns = shape[1]
        if not isinstance(self.granularity, int):
            return columns, 1
        groups = -(-columns // self.granularity)
        return groups * self.granularity, groups

    def layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """compressed-tensors' own names, types and bytes, except `asym_float` and short last groups: it has neither."""
        rows, columns = shape
        if isinstance(self.granularity, int) and self.granularity > columns:
            raise PlanError(f"group {self.granularity} is larger than a row of {columns}: use at most g{columns}")
        stored, groups = self._padded(shape)
        scales = (1,) if self.granularity == "tensor" else (rows, groups)
        specs = {
            "weight_packed": TensorSpec((rows, packing.words_per_row(stored, self.bits)), torch.int32),
            "weight_scale": TensorSpec(scales, self._stored_scale),
            "weight_shape": TensorSpec((2,), torch.int64),
        }
        if self.convention == "asym":  # packed along the rows
            zero_rows = 1 if self.granularity == "tensor" else rows
            words = packing.words_per_row(zero_rows, self.bits)
            specs["weight_zero_point"] = TensorSpec((words, groups), torch.int32)
        elif self.convention == "asym_float":
            specs["weight_zero_point"] = TensorSpec(scales, self._stored_scale)
        return specs

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        rows, columns = codes.shape
        missing = self._padded((rows, columns))[0] - columns
        if missing:  # the code of 0.0, as the last group has it
            zeros = torch.zeros(rows, missing, device=codes.device)
            codes = torch.cat([codes, self.encode(zeros, grid.columns(columns, columns + missing))], dim=1)
        unsigned = (codes + self._middle if self._signed else codes).to(torch.uint8)
        scale = grid.scale.to(self._stored_scale)
        named = {
            "weight_packed": packing.pack_words(unsigned, self.bits),
            "weight_scale": scale.reshape(-1) if self.granularity == "tensor" else scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if self.convention == "asym":
            assert grid.zero is not None
            named["weight_zero_point"] = packing.pack_words(grid.zero.T.to(torch.uint8), self.bits).T.contiguous()
        elif self.convention == "asym_float":
            assert grid.zero is not None
            named["weight_zero_point"] = grid.zero.to(self._stored_scale).view(named["weight_scale"].shape)
        return named

    def unpack(self, named: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        codes = packing.unpack_words(named["weight_packed"], self.bits, shape[1])
        if self._signed:
            codes = (codes - self._middle).view(torch.int8)  # uint8 wraps to the two's complement
        scale = named["weight_scale"].float().view(-1, self._padded(shape)[1])
        zero = self._unpack_zero(named, scale)
        return codes, Grid(scale, zero, self._group(shape[1]))

    def _unpack_zero(self, named: dict[str, Tensor], scale: Tensor) -> Tensor | None:
        if self._signed:
            return None
        if self.convention == "sym_gptq":
            return torch.full_like(scale, self._middle)
        stored = named["weight_zero_point"]
        if self.convention == "asym_float":
            return stored.float().view_as(scale)
        return packing.unpack_words(stored.T, self.bits, scale.shape[0]).T.float()

    def packed_weight(self, named: dict[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        groups = self._padded(shape)[1]
        scale = named["weight_scale"].view(-1, groups)
        zero: Tensor | int = self._middle
        offset = None
        if self.convention == "asym":
            zero = packing.unpack_words(named["weight_zero_point"].T, self.bits, scale.shape[0]).T.contiguous()
        elif self.convention == "asym_float":
            zero, offset = 0, named["weight_zero_point"].view(-1, groups)
        return PackedWeight(named["weight_packed"], self.bits, shape, self._group(shape[1]), scale, zero, offset)


Found = tuple[Tensor, Tensor | None, Tensor]  # scale, zero, loss (rows, groups)


def _better(new: Found, old: Found) -> Found:
    """Group by group the one with less loss; the old where they are equal."""
    better = new[2] < old[2]
    zero = old[1] if old[1] is None or new[1] is None else torch.where(better, new[1], old[1])
    return torch.where(better, new[0], old[0]), zero, torch.where(better, new[2], old[2])


def parse(name: str, tokens: list[str]) -> Integer:
    """`int4` and the tokens after it: g128 | channel | tensor, a convention, fp16 | bf16 | fp32."""
    fmt = Integer(int(name.removeprefix("int")))
    for token in tokens:
        if token in ("channel", "tensor"):
            fmt = replace(fmt, granularity=token)
        elif token[:1] == "g" and token[1:].isdecimal():
            fmt = replace(fmt, granularity=int(token[1:]))
        elif token in CONVENTIONS:
            fmt = replace(fmt, convention=token)
        elif token in SCALE_TYPES:
            fmt = replace(fmt, scale_dtype=SCALE_TYPES[token])
        else:
            known = ", ".join(["g<columns>", "channel", "tensor", *CONVENTIONS, *SCALE_TYPES])
            raise PlanError(f"{name} has no option {token!r}: options are {known}")
    return fmt
