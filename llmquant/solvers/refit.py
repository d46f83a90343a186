"""With all codes as they are: the scales, and the entries of learned tables, that lose least.

tr((W - Q) H (W - Q)^T) is a quadratic of either. A scale is found group after group; a table is a weighted least
squares problem of as many unknowns as it has levels. Whatever is found is kept where it still is better once it is
rounded to its stored type.

Source of updating a codebook by the Hessian: M. van Baalen et al., "GPTVQ", arXiv:2402.15319, section 3.3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmquant.formats import Format, Grid
from llmquant.formats.base import PIECE
from llmquant.formats.kmeans import KMeans
from llmquant.products import product, runs
from llmquant.solvers import loops
from llmquant.solvers.algebra import of_columns, steps_of
from llmquant.stats import row_energy


def refit(w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor) -> tuple[Grid, Tensor]:
    """The grid of least loss for places (out, in) uint8 of levels, and the places on it: those of the same levels."""
    grid = scales(w, places, grid, fmt, hessian)
    return (grid, places) if grid.levels is None else tables(w, places, grid, fmt, hessian)


def scales(w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor, felt: Tensor | None = None) -> Grid:
    """Group after group the scale of least loss for the codes as they are, kept where its stored value is better.

    felt: (Q - w) H (out, in) float32, where it is known; it becomes that on the grid found.
    """
    if len(grid.scale) != len(w):  # one scale for all rows: it is not the rows' to choose
        return grid
    lattice = fmt.lattice(grid)
    steps = steps_of(places, lattice)
    felt = loops.gradient(w, places, lattice, hessian) if felt is None else felt
    scale = grid.scale.clone()
    for index, columns in enumerate(runs(0, w.shape[1], grid.group)):
        mine = steps[:, columns]
        slope = -torch.linalg.vecdot(mine, felt[:, columns])
        bend = row_energy(mine, hessian[columns, columns])
        wanted = torch.where(bend > 0, scale[:, index] + slope / bend, scale[:, index])
        wanted = fmt.storable(wanted, grid, index)
        change = wanted - scale[:, index]
        better = torch.isfinite(change) & (change * (change * bend - 2 * slope) < 0)
        change = torch.where(better, change, 0.0)
        # not scale + change, which need not be what a file can hold
        scale[:, index] = torch.where(better, wanted, scale[:, index])
        product(mine * change.unsqueeze(1), hessian[columns], felt)
    return replace(grid, scale=scale)


def tables(w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor) -> tuple[Grid, Tensor]:
    """The tables of least loss for the codes as they are, one for each row or for the tensor, and new places.

    A table is kept where it still is better after rounding to its stored type. New places say the same levels in the
    ascending order of the new table.
    """
    assert grid.levels is not None
    normal, right = equations(w, places, grid, hessian)
    unused = normal.diagonal(dim1=1, dim2=2) <= 0
    normal.diagonal(dim1=1, dim2=2)[unused] = 1.0
    old = grid.levels.double()
    right = torch.where(unused, old, right)
    found = torch.linalg.solve(normal, right)
    found = torch.where(found.isfinite().all(1, keepdim=True), found, old).float()
    ascending, order = found.sort(dim=1, stable=True)
    stored = fmt.moved(grid, levels=ascending).levels
    assert stored is not None
    new = stored.gather(1, order.argsort(dim=1))  # in the order of the old
    better = _loss(normal, right, new.double()) < _loss(normal, right, old)
    levels, order = torch.where(better.unsqueeze(1), new, grid.levels).sort(dim=1, stable=True)
    back = order.argsort(dim=1).to(torch.uint8)
    return replace(grid, levels=levels), back.expand(len(w), -1).gather(1, places.long())


def _loss(normal: Tensor, right: Tensor, levels: Tensor) -> Tensor:
    """Of every table, less what does not depend on it."""
    return ((normal @ levels.unsqueeze(2)).squeeze(2) * levels - 2 * right * levels).sum(1)


def equations(w: Tensor, places: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """(tables, K, K) and (tables, K) float64: S^T H S and S^T H w, S (in, K) the scales where a level was chosen."""
    assert grid.levels is not None
    tables, size = grid.levels.shape
    normal = torch.zeros(tables, size, size, dtype=torch.float64, device=w.device)
    right = torch.zeros(tables, size, dtype=torch.float64, device=w.device)
    scale = of_columns(grid.scale, w.shape[1], grid.group).expand_as(w)
    step = max(1, 4 * PIECE // (size * w.shape[1]))
    for start in range(0, len(w), step):
        some = slice(start, start + step)
        chosen = torch.zeros(*places[some].shape, size, device=w.device)
        chosen.scatter_(2, places[some].long().unsqueeze(2), scale[some].unsqueeze(2))
        felt = hessian @ chosen  # (rows, in, K)
        of_rows = (chosen.mT @ felt).double(), (felt.mT @ w[some].unsqueeze(2)).squeeze(2).double()
        if tables == 1:
            normal += of_rows[0].sum(0)
            right += of_rows[1].sum(0)
        else:
            normal[some], right[some] = of_rows
    return normal, right


def without_tables(fmt: Format) -> str | None:
    """Why there is no table to learn in the format, if so."""
    if isinstance(fmt, KMeans):
        return None
    return f"learns tables, and {fmt.spec} has none to learn: use solver gptq, or a format such as kmeans4:channel"
