"""Codebooks inside the GPTQ loop: the table is fitted to the weights by importance, then to what rounding makes of it.

The format's own fit clusters every weight by itself, weighted with the diagonal of the Hessian. Here columns are
rounded to that table by GPTQ, errors being made up for by later columns; with all codes as they are the table of least
tr((W - Q) H (W - Q)^T) is a weighted least squares problem of as many unknowns as it has levels, one for each row or
for the tensor; and coordinate descent moves codes for the new table. The last two take turns.

Source of the clustering: arXiv:2306.07629, section 4.1; of updating a codebook by the Hessian: M. van Baalen et al.,
"GPTVQ", arXiv:2402.15319, section 3.3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmquant.formats import Format, Grid
from llmquant.formats.base import PIECE
from llmquant.formats.kmeans import KMeans
from llmquant.solvers import gptq, loops
from llmquant.solvers.base import Solution
from llmquant.stats import Stats


def solve(
    w: Tensor, stats: Stats | None, fmt: Format, *, damp: float = 0.03, target: bool = True, rounds: int = 2
) -> Solution:
    """w (out, in) float32, a kmeans format. Raises what Format.fit raises, and ValueError without calibration.

    damp, target: as those of gptq; rounds: of fitting the table to the codes and the codes to the table.
    """
    if stats is None:
        raise ValueError("kmeans needs calibration")
    ladder = gptq.Ladder(w, stats.held)
    importance = stats.importance()
    ladder.offer("rounding", *fmt.quantize(w, importance), fmt)
    hessian = gptq.damped(stats.hessian, damp)
    aim = gptq.aimed(w, stats) if target else w
    grid = fmt.fit(aim, importance)
    lattice = fmt.lattice(grid)
    places = gptq.sweep(aim, hessian, lattice)
    ladder.offer("sweep", lattice.codes[places.int()], grid, fmt)
    for round in range(rounds):
        grid, places = refit(aim, places, grid, fmt, hessian)
        lattice = fmt.lattice(grid)
        places, _ = loops.descend(aim, places, lattice, hessian)
        ladder.offer(f"descent {round + 1}", lattice.codes[places.int()], grid, fmt)
    if rounds:
        grid, places = refit(aim, places, grid, fmt, hessian)
        ladder.offer("refit", lattice.codes[places.int()], grid, fmt)
    rival = None
    if stats.curvature is not None and rounds:
        codes = gptq.two_sided(aim, places, grid, fmt, hessian, stats.curvature)
        rival = gptq.solution(w, codes, grid, fmt, stats)
    return replace(gptq.solution(w, ladder.codes, ladder.grid, fmt, stats), steps=tuple(ladder.steps), rival=rival)


def refit(w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor) -> tuple[Grid, Tensor]:
    """The scales, where there are some, and then the tables of least loss for the codes as they are, and new places.

    A table is kept where it still is better after rounding to its stored type. New places say the same levels in the
    ascending order of the new table.
    """
    grid = gptq.refit(w, places, grid, fmt, hessian)
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
    scale = gptq.of_columns(grid.scale, w.shape[1], grid.group).expand_as(w)
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


def refuses(fmt: Format) -> str | None:
    """Why the format is none for this solver, if so."""
    if isinstance(fmt, KMeans):
        return None
    return f"learns tables, and {fmt.spec} has none to learn: use solver gptq, or a format such as kmeans4:channel"
