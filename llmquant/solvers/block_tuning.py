"""Tuning the matrices of one block together, by gradients of what the block puts out: the contract, and what is common.

A tuner starts from the grids that a solver found and may move roundings and ranges; it knows no model, only how far the
block's outputs are from those of the original on a batch, and how that changes with every weight. This works for every
format, by its lattice: with t(x) the place of a value among the levels, as a real number, a weight w becomes the level
at place

    round(t(w) + v),  -1/2 <= v <= 1/2 for one step up or down,

and what is differentiated is not the rounding, which has no slope, but the line through the levels (Y. Bengio et al.,
"Estimating or Propagating Gradients Through Stochastic Neurons", arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.formats import Format, Grid
from llmquant.formats.base import between
from llmquant.solvers.algebra import of_columns
from llmquant.solvers.base import Solution
from llmquant.stats import energy


@dataclass(frozen=True)
class Part:
    """One matrix of a block: its weight (out, in) float32, and the grid to start from."""

    weight: Tensor
    format: Format
    grid: Grid


# gradient(batch, weights) -> the mean square of what the block's outputs lack on that batch, with these weights in
# place, and its gradient in each of them (up to a factor, the same for all).
Gradient = Callable[[int, dict[str, Tensor]], tuple[float, dict[str, Tensor]]]
# tune(parts, gradient, batches, seed, **options) -> solutions, both by name; batches are numbered from 0.
Tuner = Callable[..., dict[str, Solution]]


class Rounding:
    """How a part is rounded: offsets v (out, in) in code units, and the ends of the range, as factors of the start's.

    The range has one factor, `high`, but where a zero point of the format's own is tuned with it: there low and high
    ends have each their own. Factors are of the shape of the grid's scale.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.columns = part, part.weight.shape[1]
        self.start = part.format.lattice(part.grid)
        self.offsets = torch.zeros_like(part.weight)
        self.low, self.high = (torch.ones_like(part.grid.scale) for _ in range(2))
        self.bottom, self.top = self.start.levels[:, :1], self.start.levels[:, -1:]
        zero = part.grid.zero
        self.two_ended = zero is not None and not part.format.moved(part.grid, zero=(zero == 0).float()).equals(
            part.grid
        )

    # ---- from parameters to weights

    def grid(self) -> Grid:
        """The start's grid with the range of today, as a file can hold it."""
        scale, zero = self._wanted()
        grid = self.part.format.moved(self.part.grid, scale=scale)
        return self.part.format.moved(grid, zero=self._zero(grid.scale)) if zero is not None else grid

    def _wanted(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero that the factors ask for."""
        if not self.two_ended:
            return self.start.scale * self.high, None
        low, high = self._ends()
        scale = (self.high * high - self.low * low) / (self.top - self.bottom)
        scale = torch.where(scale * self.start.scale > 0, scale, self.start.scale)  # the ends have passed each other
        return scale, self._zero(scale)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The values of the lowest and the highest level on the start's grid."""
        if self.start.offset is not None:
            return (self.bottom * self.start.scale + self.start.offset, self.top * self.start.scale + self.start.offset)
        assert self.start.zero is not None
        return (self.bottom - self.start.zero) * self.start.scale, (self.top - self.start.zero) * self.start.scale

    def _zero(self, scale: Tensor) -> Tensor:
        """What keeps the low end where its factor puts it."""
        low = self.low * self._ends()[0]
        return low - self.bottom * scale if self.start.offset is not None else self.bottom - low / scale

    def decode(self) -> Tensor:
        """The weight (out, in) as it is rounded today; what `gradients` needs is kept."""
        lattice = self.part.format.lattice(self.grid())
        self.scale, self.zero, self.offset = (
            self.part.weight.new_zeros(()) if each is None else of_columns(each, self.columns, lattice.group)
            for each in (lattice.scale, lattice.zero, lattice.offset)
        )
        safe = torch.where(self.scale == 0, torch.inf, self.scale)
        self.ratio = (self.part.weight - self.offset) / safe
        place, self.gap = between(self.ratio + self.zero, lattice.levels)
        place += self.offsets
        last = lattice.levels.shape[1] - 1
        self.inside = (place >= -0.5) & (place <= last + 0.5)
        self.places = place.round_().clamp_(0, last).long()
        self.steps = lattice.levels.expand(len(place), -1).gather(1, self.places) - self.zero
        return self.steps * self.scale + self.offset

    def solution(self) -> Solution:
        """As it is rounded today."""
        change = self.decode().sub_(self.part.weight)
        return Solution(self.start.codes[self.places], self.grid(), energy(change))

    # ---- from gradients in the weight to those in the parameters

    def gradients(self, of_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of offsets, low and high, straight through all rounding, given that of the weight last decoded."""
        through = of_weight * self.inside
        of_scale = self._sum(of_weight * self.steps - through * self.ratio)
        if not self.two_ended:
            return through * self.scale * self.gap, torch.zeros_like(self.low), of_scale * self.start.scale
        low, high = self._ends()
        span = self.top - self.bottom
        by_low, by_high = -low / span, high / span  # the scale's own slopes
        missed = self._sum(of_weight - through)
        if self.start.offset is not None:
            of_scale = of_scale - missed * self.bottom
            of_low = missed * low
        else:
            scale = self._wanted()[0]
            of_zero = -missed * scale
            of_scale = of_scale + of_zero * self.low * low / scale.square()
            of_low = -of_zero * low / scale
        return through * self.scale * self.gap, of_low + of_scale * by_low, of_scale * by_high

    def _sum(self, x: Tensor) -> Tensor:
        """Over what shares an entry of the grid, of the shape of its scale."""
        group = self.part.grid.group
        sums = functional.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group)).sum(-1)
        return sums.sum(0, keepdim=True) if len(self.part.grid.scale) == 1 else sums
