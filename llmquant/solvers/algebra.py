"""What solvers do to matrices alike: damp a Hessian and factor it, lay out what groups of columns share.

Factors and what they solve are made of products, whose bits are the same for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.formats.base import Lattice
from llmquant.products import product, runs
from llmquant.solvers.base import note_recovery, recoveries
from llmquant.stats import Stats

DAMPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
BLOCK = 128  # columns of a factor that are found at once: those of 256 have other bits on two threads
PANEL = 1024  # columns whose blocks are brought up to date by the rest of a matrix in one product


def raised(diagonal: Tensor, damp: float) -> Tensor:
    """The diagonal (in,) of a Hessian, raised by the fraction `damp` of itself.

    Relative to each input's own size, so that a loud input does not drown the others, and weights and inputs may be
    scaled against each other without changing a thing. Inputs that were never active get a millionth of the mean.
    """
    floor = (1e-6 * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return (diagonal * (1 + damp)).clamp_min_(floor)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """A copy of the Hessian (in, in) with its diagonal raised."""
    hessian = hessian.clone()
    hessian.diagonal().copy_(raised(hessian.diagonal(), damp))
    return hessian


def factored(matrix: Tensor) -> Tensor | None:
    """Upper U (n, n) with U U^T = matrix, which it takes the place of; None where that is not positive definite.

    The Cholesky factor from the last column to the first, a block of columns at a time: nearly all of it products.
    """
    for panel in reversed(runs(0, len(matrix), PANEL)):
        above = matrix[: panel.stop]
        product(above[:, panel.stop :], above[panel, panel.stop :].T, above[:, panel], -1)
        for here in reversed(runs(panel.start, panel.stop, BLOCK)):
            later = slice(here.stop, panel.stop)
            column = matrix[: here.stop, here]
            product(matrix[: here.stop, later], matrix[here, later].T, column, -1)
            lower, failed = torch.linalg.cholesky_ex(column[here].flip(0, 1))
            if failed or not lower.diagonal().isfinite().all():
                return None
            own, rest = lower.flip(0, 1), column[: here.start]
            rest.copy_(torch.linalg.solve_triangular(own.T, rest, upper=False, left=False))
            column[here] = own
            matrix[here.stop :, here] = 0
    return matrix


def solved(right: Tensor, factor: Tensor) -> Tensor:
    """X (rows, n) with X U U^T = right, which it takes the place of, for the factor U (n, n)."""
    panels = runs(0, len(factor), PANEL)
    for panel in reversed(panels):
        product(right[:, panel.stop :], factor[panel, panel.stop :].T, right[:, panel], -1)
        for here in reversed(runs(panel.start, panel.stop, BLOCK)):
            later = slice(here.stop, panel.stop)
            part = product(right[:, later], factor[here, later].T, right[:, here], -1)
            part.copy_(torch.linalg.solve_triangular(factor[here, here].T, part, upper=False, left=False))
    for panel in panels:
        product(right[:, : panel.start], factor[: panel.start, panel], right[:, panel], -1)
        for here in runs(panel.start, panel.stop, BLOCK):
            before = slice(panel.start, here.start)
            part = product(right[:, before], factor[before, here], right[:, here], -1)
            part.copy_(torch.linalg.solve_triangular(factor[here, here], part, upper=True, left=False))
    return right


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper V with V^T V = hessian^-1, more damped where it must be: see robust_factor."""
    factor = robust_factor(hessian)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)


def robust_factor(hessian: Tensor, diagonal: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Upper U with U U^T = hessian[order][:, order], of a Hessian that may be singular: more damping until it is not.

    diagonal (in,): what takes the place of the Hessian's own.
    """
    diagonal = hessian.diagonal() if diagonal is None else diagonal
    order = torch.arange(len(hessian), device=hessian.device) if order is None else order
    for extra in (0.0, *DAMPS):
        matrix = torch.empty_like(hessian)
        for rows in runs(0, len(matrix), BLOCK):  # which stay in cache
            matrix[rows] = hessian.index_select(0, order[rows]).index_select(1, order)
        matrix.diagonal().copy_((raised(diagonal, extra) if extra else diagonal)[order])
        factor = factored(matrix)
        if factor is not None:
            if extra:
                note_recovery(f"the Hessian is not positive definite: its diagonal was raised by {extra:.0%}")
            return factor
    note_recovery("the Hessian is not positive definite, however damped: errors are not spread")
    return torch.diag(diagonal[order].sqrt())  # errors stay where they are made: plain rounding


def arrange(x: Tensor, order: Tensor) -> None:
    """Put the columns of x (out, in) in that order, in place."""
    for rows in x.split(BLOCK):
        rows.copy_(rows.index_select(1, order))


@dataclass(frozen=True)
class Metric:
    """What errors of a weight cost, and in which order its columns are rounded.

    order (in,) int64, by the descending diagonal of the damped Hessian; factor (in, in): upper, U U^T =
    hessian[order][:, order]; noted: what had to be done for it.
    """

    order: Tensor
    factor: Tensor
    noted: tuple[str, ...]

    @classmethod
    def of(cls, hessian: Tensor, damp: float) -> Metric:
        diagonal = raised(hessian.diagonal(), damp)
        order = diagonal.argsort(descending=True, stable=True)
        with recoveries() as noted:
            factor = robust_factor(hessian, diagonal, order)
        return cls(order, factor, tuple(noted))

    def solved(self, right: Tensor) -> Tensor:
        """right hessian^-1, for right (rows, in)."""
        found = solved(right.index_select(1, self.order), self.factor)
        arrange(found, self.order.argsort())
        return found


def metric(stats: Stats, damp: float) -> Metric:
    """That of the damped Hessian: made once for all linears that share their input, and kept with its sums."""
    if damp not in stats.shared:
        stats.shared[damp] = Metric.of(stats.hessian, damp)
    found: Metric = stats.shared[damp]
    for what in found.noted:
        note_recovery(what)
    return found


def steps_of(places: Tensor, lattice: Lattice) -> Tensor:
    """The levels chosen less their zero (out, in) float32: what the scale multiplies."""
    levels = lattice.levels.expand(len(places), -1).gather(1, places.long())
    if lattice.zero is not None:
        levels -= of_columns(lattice.zero, places.shape[1], lattice.group)
    return levels


def of_columns(values: Tensor, columns: int, group: int) -> Tensor:
    """(out or 1, groups) -> (out or 1, columns)"""
    return values.repeat_interleave(group, dim=1)[:, :columns]
