"""Fake quantization: a weight in full precision that a model computes with as its format would store it.

The forward pass rounds the master weight to the nearest level of its format and decodes it again, by the format's own
`encode` and `decode`: so the file that is written at the end holds the very values that were trained. The backward pass
goes through the rounding as if it were not there, within the range of the levels, and learns scale and zero point with
the weight: S. K. Esser et al., "Learned Step Size Quantization", arXiv:1902.08153, section 2.1; Y. Bhalgat et al.,
"LSQ+", arXiv:2004.09576, section 3.1, for zero points. A format is asked for its lattice, for what it can store, and
for `encode` and `decode`; it knows nothing of training.

nearest     the format's own rounding
stochastic  up or down by chance, so that the mean is the weight: S. Gupta et al., "Deep Learning with Limited Numerical
            Precision", arXiv:1502.02551, section 3
floor       down, as shifted integers are in hardware that does not round
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import PlanError
from llmquant.formats import Format, Grid
from llmquant.formats.base import between, gaps
from llmquant.matrices import Target
from llmquant.trained import Weight

ROUNDINGS = ("nearest", "stochastic", "floor")


class FakeQuantized(Weight):
    """A matrix (out, in): its own weight plus `shift`, in steps of the grid that it began with, rounded to its format.

    shift (out, in) float32: what makes the weight the master weight, which is never rounded itself.
    stretch: the logarithm of a factor of every scale, which is rounded to its stored type before it is used.
    drift: what is added to every zero point, in steps; None where the format has none that can be moved.
    """

    def __init__(self, target: Target, fmt: Format, grid: Grid, dtype: torch.dtype, rounding: str = "nearest") -> None:
        """dtype: what the model computes in. Chances of stochastic rounding are drawn from torch's own generator: what
        runs again on the way back has to see the same.
        """
        super().__init__()
        if rounding not in ROUNDINGS:
            raise PlanError(f"rounding {rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}")
        self.target, self.format, self.start, self.dtype = target, fmt, grid, dtype
        self.rounding = rounding
        lattice = fmt.lattice(grid)
        unit = self.wide(lattice.scale.abs() * gaps(lattice.levels))
        self.unit_of_group, self.unit = lattice.scale.abs(), unit
        self.shift = nn.Parameter(torch.zeros(target.shape, device=grid.scale.device))
        self.stretch = nn.Parameter(torch.zeros_like(grid.scale))
        self.drift = nn.Parameter(torch.zeros_like(grid.scale)) if _moves_zero(fmt, grid) else None

    def master(self, original: Tensor) -> Tensor:
        """The weight in full precision (out, in) float32. original: the module's own tensor."""
        return self.target.seen(original).float() + self.shift * self.unit

    def grid(self) -> Grid:
        """Where the levels are now, as a file can hold it."""
        grid = self.format.moved(self.start, scale=self.start.scale * self.stretch.exp())
        if self.drift is None or self.start.zero is None:
            return grid
        step = self.unit_of_group if self.format.lattice(grid).offset is not None else 1.0
        return self.format.moved(grid, zero=self.start.zero + self.drift * step)

    def value(self, original: Tensor) -> Tensor:
        with torch.no_grad():
            grid = self.grid()
        w = _Straight.apply(self.master(original), self.stretch, self.drift, grid, self)
        return self.target.stored(w.to(self.dtype))

    @torch.no_grad()
    def codes(self, w: Tensor, grid: Grid) -> Tensor:
        """How w (out, in) float32 is rounded."""
        if self.rounding == "nearest":
            return self.format.encode(w, grid)
        lattice = self.format.lattice(grid)
        place, _ = between(self._steps(w, grid), lattice.levels)
        if self.rounding == "stochastic":
            place = place + torch.rand_like(place)
        # floor of what lies on a level, up to float32's own rounding, is that level
        place = (place + 1e-5 * (self.rounding == "floor")).floor().clamp(0, lattice.levels.shape[1] - 1)
        return lattice.codes[place.int()]

    @torch.no_grad()
    def solution(self, original: Tensor) -> tuple[Tensor, Grid]:
        """Codes and grid, rounded to the nearest whatever training did."""
        grid = self.grid()
        return self.format.encode(self.master(original), grid), grid

    def wide(self, values: Tensor) -> Tensor:
        """(out or 1, groups) -> (out or 1, in)"""
        return values.repeat_interleave(self.start.group, dim=1)[:, : self.target.shape[1]]

    def _steps(self, w: Tensor, grid: Grid) -> Tensor:
        """Where w lies, in the unit of levels."""
        lattice = self.format.lattice(grid)
        scale = self.wide(lattice.scale)
        shifted = w if lattice.offset is None else w - self.wide(lattice.offset)
        steps = shifted / torch.where(scale == 0, torch.inf, scale)
        return steps if lattice.zero is None else steps + self.wide(lattice.zero)


def _moves_zero(fmt: Format, grid: Grid) -> bool:
    return grid.zero is not None and not fmt.moved(grid, zero=(grid.zero == 0).float()).equals(grid)


class _Straight(torch.autograd.Function):
    """Encode and decode; the derivative is that of the clipped line, and of the scale and zero that it goes through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, stretch: Tensor, drift: Tensor | None, grid: Grid, part: FakeQuantized) -> Tensor:
        codes = part.codes(w, grid)
        ctx.save_for_backward(w, codes)
        ctx.grid, ctx.part = grid, part
        return part.format.decode(codes, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (w, codes), part, grid, (gradient,) = ctx.saved_tensors, ctx.part, ctx.grid, gradients
        lattice = part.format.lattice(grid)
        place = part._steps(w, grid)
        inside = (place >= lattice.levels[:, :1]) & (place <= lattice.levels[:, -1:])
        of_weight = gradient * inside
        rounded = part._steps(part.format.decode(codes, grid), grid)
        zero = 0.0 if lattice.zero is None else part.wide(lattice.zero)
        # Of one inside its range: what rounding did to it. Of one beyond it: the level at the end.
        slope = torch.where(inside, rounded - place, rounded - zero)
        of_scale = _summed(gradient * slope, lattice.group, len(grid.scale)) * lattice.scale
        of_drift = None
        if part.drift is not None:
            step = -lattice.scale if lattice.offset is None else part.unit_of_group
            of_drift = _summed(gradient - of_weight, lattice.group, len(grid.scale)) * step
        least = _gradient_scale(part, lattice.levels)
        return of_weight, of_scale * least, None if of_drift is None else of_drift * least, None, None


def _gradient_scale(part: FakeQuantized, levels: Tensor) -> float:
    """1 / sqrt(weights of a scale times the highest level): keeps updates of scales in proportion to those of weights,
    in the norm to which gradients are clipped; Adam itself is blind to it.
    """
    rows = 1 if len(part.start.scale) > 1 else part.target.shape[0]
    return 1 / math.sqrt(rows * min(part.start.group, part.target.shape[1]) * float(levels.abs().max()))


def _summed(x: Tensor, group: int, rows: int) -> Tensor:
    """Over what shares an entry of the grid, (rows, groups)."""
    sums = nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group)).sum(-1)
    return sums.sum(0, keepdim=True) if rows == 1 else sums
