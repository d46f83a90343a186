"""Scales that are few and far between, such as powers of two: chosen again, for what rounding has made of the rest.

With all codes as they are, a scale twice as large is hardly ever better. So the columns that share one are rounded
afresh for every other scale, on the goal that the errors of all other columns set them, and keep what loses less of
tr((W - Q) H (W - Q)^T), row by row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmquant.formats import Format, Grid
from llmquant.products import runs
from llmquant.solvers import loops
from llmquant.solvers.algebra import of_columns, robust_factor, solved


def choose(
    w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor, felt: Tensor | None = None
) -> tuple[Grid, Tensor]:
    """The grid and the places (out, in) uint8, after every other scale that the format names has been tried once.

    felt: (Q - w) H (out, in) float32, where it is known; it becomes that at what is found.
    """
    which = 0
    while (other := fmt.alternative(grid, which)) is not None:
        felt = loops.gradient(w, places, fmt.lattice(grid), hessian) if felt is None else felt
        grid, places = _tried(w, places, grid, *other, fmt, hessian, felt)
        which += 1
    return grid, places


def _tried(
    w: Tensor,
    places: Tensor,
    grid: Grid,
    width: int,
    scale: Tensor,
    fmt: Format,
    hessian: Tensor,
    felt: Tensor,
) -> tuple[Grid, Tensor]:
    """With one other scale for each `width` columns."""
    lattice, error = fmt.lattice(replace(grid, scale=scale)), loops.missed(w, places, fmt.lattice(grid))
    places, chosen = places.clone(), grid.scale.clone()
    for here in runs(0, w.shape[1], width):
        groups = slice(here.start // grid.group, -(-here.stop // grid.group))
        local, mine = hessian[here, here], error[:, here]
        rest = felt[:, here] - mine @ local  # what the errors of other columns ask for
        factor = robust_factor(local)
        goal = w[:, here] - solved(rest.clone(), factor)
        columns = torch.arange(here.start, here.stop, device=w.device)
        mix = factor / factor.diagonal()
        found, _ = loops.gptq_block(goal, torch.zeros_like(goal), mix, lattice, columns)
        levels = lattice.levels.expand(len(w), -1).gather(1, found.long())
        new = levels * of_columns(scale[:, groups], here.stop - here.start, grid.group) - w[:, here]
        better = _loss(new, local, rest) < _loss(mine, local, rest)
        felt.addmm_((new - mine) * better.unsqueeze(1), hessian[here])
        places[better, here], error[better, here], chosen[better, groups] = (
            each[better] for each in (found, new, scale[:, groups])
        )
    return replace(grid, scale=chosen), places


def _loss(error: Tensor, hessian: Tensor, rest: Tensor) -> Tensor:
    """Of every row, as far as these columns matter."""
    return ((error @ hessian + 2 * rest) * error).sum(1)
