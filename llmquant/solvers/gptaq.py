"""GPTAQ: GPTQ that also makes up for how far the inputs of the quantized model are from those of the original.

With x the inputs of the quantized model and x_ref those of the original, the residual that a column leaves behind is
not only what its rounding lost: its input has moved as well. Both are spread over the columns still to come,

    rest -= e U - w P,   e = (w - q) / u_ii,   P = alpha triu(E[(x_ref - x) x^T] U^T, 1) U,

with U the upper factor of the inverse Hessian and w the column as it is when its turn comes.

Source: Y. Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv:2504.02692,
section 3.3 and algorithm 1. `gptq` aims at a target instead, of which this is an approximation, and is better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.formats.base import Lattice
from llmquant.solvers import loops
from llmquant.solvers.algebra import inverse_factor
from llmquant.solvers.base import Solution
from llmquant.solvers.gptq import solution
from llmquant.stats import Stats


def solve(
    w: Tensor, stats: Stats | None, fmt: Format, *, clip: str = "search", damp: float = 0.01, alpha: float = 0.25
) -> Solution:
    """w (out, in) float32. Raises what Format.fit raises, and ValueError without calibration.

    clip: the format's named rule for the range; damp: what is added to the Hessian's diagonal, as a fraction of its
    mean; alpha: how much of the inputs' difference is made up for, 1 being all of it.
    """
    if stats is None:
        raise ValueError("gptaq needs calibration")
    grid = fmt.fit(w, stats.importance(), clip=clip)
    lattice = fmt.lattice(grid)
    cross = torch.zeros_like(stats.hessian) if stats.cross is None else stats.cross
    places = sweep(w, raised(stats.hessian, damp), alpha * cross, lattice)
    codes = lattice.codes[places.int()]
    return solution(w, codes, grid, fmt, stats)


def raised(hessian: Tensor, damp: float) -> Tensor:
    """The Hessian (in, in), symmetric to the last bit, a fraction of the mean of its diagonal added to that."""
    hessian = (hessian + hessian.T).div_(2)
    diagonal = hessian.diagonal()
    diagonal.add_((damp * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny))
    return hessian


def sweep(w: Tensor, hessian: Tensor, cross: Tensor, lattice: Lattice) -> Tensor:
    """Places (out, in) uint8 of the levels chosen, columns of large diagonal first, the grid fixed beforehand.

    cross (in, in): sum of (x_ref - x) x^T, on the scale of the Hessian.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])
    carried = (cross[order][:, order] @ factor.T).triu_(1) @ factor
    rest = w[:, order].contiguous()
    places = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[1], loops.BLOCK):
        block = slice(start, min(start + loops.BLOCK, w.shape[1]))
        current, errors = rest[:, block].contiguous(), torch.empty_like(rest[:, block])
        for i in range(start, block.stop):
            here, at = slice(i - start, i - start + 1), slice(i, i + 1)
            later, after = current[:, i - start + 1 :], slice(i + 1, block.stop)
            column = current[:, here].contiguous()
            nothing, alone = torch.zeros_like(column), torch.ones_like(column[:1])
            places[:, order[at]], moved = loops.gptq_block(column, nothing, alone, lattice, order[at])
            errors[:, here] = moved.div_(-factor[i, i])
            later.addmm_(errors[:, here], factor[at, after], alpha=-1).addmm_(column, carried[at, after])
        rest[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
        rest[:, block.stop :].addmm_(current, carried[block, block.stop :])
    return places
