"""What solvers do to matrices alike: damp a Hessian and factor it, lay out what groups of columns share."""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats.base import Lattice
from llmquant.solvers.base import note_recovery

DAMPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def damped(hessian: Tensor, damp: float) -> Tensor:
    """The Hessian (in, in), symmetric to the last bit, its diagonal raised by the fraction `damp` of itself.

    Relative to each input's own size, so that a loud input does not drown the others, and weights and inputs may be
    scaled against each other without changing a thing. Inputs that were never active get a millionth of the mean.
    """
    hessian = (hessian + hessian.T).div_(2)
    diagonal = hessian.diagonal()
    floor = (1e-6 * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    diagonal.mul_(1 + damp).clamp_min_(floor)
    return hessian


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """Upper U with U^T U = hessian^-1: of the flipped matrix one Cholesky factor, inverted and flipped back.

    Half the arithmetic of inverting and factoring again, and one rounding less. None where the matrix is not positive
    definite.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        return None
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def robust_factor(hessian: Tensor) -> Tensor:
    """inverse_factor of a damped Hessian that may still be singular: more damping until it is not."""
    for extra in (0.0, *DAMPS):
        factor = inverse_factor(damped(hessian, extra) if extra else hessian)
        if factor is not None and torch.isfinite(factor.diagonal()).all():
            if extra:
                note_recovery(f"the Hessian is not positive definite: its diagonal was raised by {extra:.0%}")
            return factor
    note_recovery("the Hessian is not positive definite, however damped: errors are not spread")
    return torch.diag(hessian.diagonal().rsqrt())  # errors stay where they are made: plain rounding


def steps_of(places: Tensor, lattice: Lattice) -> Tensor:
    """The levels chosen less their zero (out, in) float32: what the scale multiplies."""
    levels = lattice.levels.expand(len(places), -1).gather(1, places.long())
    if lattice.zero is not None:
        levels -= of_columns(lattice.zero, places.shape[1], lattice.group)
    return levels


def of_columns(values: Tensor, columns: int, group: int) -> Tensor:
    """(out or 1, groups) -> (out or 1, columns)"""
    return values.repeat_interleave(group, dim=1)[:, :columns]
