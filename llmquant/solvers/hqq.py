"""Half-quadratic quantization: no data, robust against outliers, a second for billions of weights.

The sum of |w - w_hat|**p, p < 1, over a group is minimized by turns: what the grid cannot reach, e, is what shrinkage
leaves of the error,

    e = sign(r) max(|r| - |r|**(p - 1) / beta, 0),  r = w - w_hat,

and the grid is moved to the least squares of w - e, the codes as they are; beta grows. It ends as soon as the mean of
|r| does not fall.

As published only a real zero point moves (`asym_float`), and r is in the unit of the weights: with beta = 10 most
weights are too small for any e. Other formats move what they have, zero point, scale or table, to the nearest that a
file can hold, and the unit of r is the mean distance of two levels.

Source: H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023); the defaults are
those of hqq 0.2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.formats import Format, Grid
from llmquant.formats.base import Lattice
from llmquant.solvers.algebra import of_columns
from llmquant.solvers.base import Solution
from llmquant.stats import Stats, energy


def solve(
    w: Tensor,
    stats: Stats | None,
    fmt: Format,
    *,
    clip: str = "minmax",
    iterations: int = 20,
    norm: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> Solution:
    """w (out, in) float32; stats are not looked at but for the loss that is noted. Raises what Format.fit raises.

    clip: the format's named rule for the range to start from; norm: p; beta, growth: what shrinkage starts with, and
    grows by in every iteration.
    """
    codes, grid = fmt.quantize(w, clip=clip)
    best, least = (codes, grid), float("inf")
    for _ in range(iterations + 1):
        error = w - fmt.decode(codes, grid)
        mean = float(error.abs().mean(dtype=torch.float64))
        if not mean < least:
            break
        best, least = (codes, grid), mean
        lattice = fmt.lattice(grid)
        unit = 1.0 if lattice.offset is not None else _distance(lattice, w.shape[1])
        grid = moved(w - shrunk(error / unit, beta, norm).nan_to_num_(0.0).mul_(unit), codes, grid, fmt)
        codes = fmt.encode(w, grid)
        beta *= growth
    codes, grid = best
    error = fmt.decode(codes, grid).sub_(w)
    return Solution(codes, grid, energy(error) if stats is None else stats.output_energy(error))


def shrunk(error: Tensor, beta: float, norm: float) -> Tensor:
    """The generalized soft threshold: what of the error is left to be an outlier."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).clamp_min_(0.0)


def moved(w: Tensor, codes: Tensor, grid: Grid, fmt: Format) -> Grid:
    """The grid of least squares for w (out, in) with codes as they are: its real zero point, or else all it has."""
    lattice = fmt.lattice(grid)
    scale = of_columns(grid.scale, w.shape[1], grid.group)
    if grid.levels is not None:  # a code is a place in the table
        return fmt.moved(grid, levels=_levels(w, codes, scale, grid.levels).sort(dim=1).values)
    counts = _of_groups(torch.ones_like(w), grid)
    values = fmt.decode(codes, grid)
    if lattice.offset is not None:
        values -= of_columns(lattice.offset, w.shape[1], grid.group)
        return fmt.moved(grid, zero=_of_groups(w - values, grid) / counts)
    steps = (values / scale).nan_to_num_(0.0)
    if lattice.zero is not None:
        before = lattice.zero
        grid = fmt.moved(grid, zero=before + _of_groups(steps - w / scale, grid) / counts)
        assert grid.zero is not None
        steps -= of_columns(grid.zero - before, w.shape[1], grid.group)
    found = _of_groups(steps * w, grid) / _of_groups(steps * steps, grid)
    return fmt.moved(grid, scale=torch.where(found.isfinite() & (found != 0), found, grid.scale))


def _distance(lattice: Lattice, columns: int) -> Tensor:
    """Between two levels, on average: (out or 1, columns)."""
    levels = (lattice.levels[:, -1:] - lattice.levels[:, :1]) / (lattice.levels.shape[1] - 1)
    return levels * of_columns(lattice.scale.abs(), columns, lattice.group)


def _of_groups(x: Tensor, grid: Grid) -> Tensor:
    """Sums of x (out, in) over what shares an entry of the grid, of the shape of its scale."""
    sums = functional.pad(x, (0, -x.shape[1] % grid.group)).unflatten(1, (-1, grid.group)).sum(-1)
    return sums.sum(0, keepdim=True) if len(grid.scale) == 1 else sums


def _levels(w: Tensor, places: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The table(s) of least squares; a level that nothing has stays as it is."""
    scale = scale.expand_as(w)
    weight, total = (levels.new_zeros(len(w), levels.shape[1]) for _ in range(2))
    weight.scatter_add_(1, places.long(), scale.square())
    total.scatter_add_(1, places.long(), scale * w)
    if len(levels) == 1:
        weight, total = weight.sum(0, keepdim=True), total.sum(0, keepdim=True)
    return torch.where(weight > 0, total / weight, levels)


def refuses(fmt: Format) -> str | None:
    """Why the format is none for this solver, if so: nothing of its grid moves by itself."""
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    codes, grid = fmt.quantize(w, clip="minmax")
    if not moved(1.7 * w + 0.3, codes, grid, fmt).equals(grid):
        return None
    return f"has nothing to move in {fmt.spec}, whose scales are bound to each other: use solver rtn or gptq"
