"""AdaRound: whether a weight is rounded up or down is found by gradients, for all weights of a matrix at once.

Between its two levels a weight is soft, low + h (high - low) with h = clamp(1.2 sigmoid(v) - 0.1, 0, 1), and begins
where it is. What is minimized is how far the outputs are from those of the original weight on its own inputs,

    E |Q x - W x_ref|^2 + strength * sum 1 - |2 h - 1|**b,

where b falls from 20 to 2, so that in the end no h between 0 and 1 is left; in the first fifth there is only the first
term. That is a quadratic form in Q of what calibration has summed up: its gradient is exact and takes no samples.

Source: M. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568, sections 3.3
and 3.4. There the strength is 0.01, for losses of any size; here it is in the unit of what one weight loses by rounding
to nearest. Where rounding to nearest does better on tokens held out, that is kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.formats.base import between
from llmquant.solvers.algebra import of_columns
from llmquant.solvers.base import Solution
from llmquant.solvers.gptq import Ladder, solution
from llmquant.stats import Stats

STRETCH, BELOW = 1.2, -0.1  # of the sigmoid, and where it then begins: it reaches 0 and 1
MOMENTS = (0.9, 0.999)  # of Adam
FREE = 0.2  # of the iterations, in which nothing drives h


def solve(
    w: Tensor,
    stats: Stats | None,
    fmt: Format,
    *,
    clip: str = "search",
    iterations: int = 1000,
    rate: float = 0.01,
    strength: float = 30.0,
) -> Solution:
    """w (out, in) float32. Raises what Format.fit raises, and ValueError without calibration.

    clip: the format's named rule for the range; iterations, rate: of Adam; strength: of what drives h to 0 or 1.
    """
    if stats is None:
        raise ValueError("adaround needs calibration")
    grid = fmt.fit(w, stats.importance(), clip=clip)
    lattice = fmt.lattice(grid)
    scale, zero, offset = (
        w.new_zeros(()) if each is None else of_columns(each, w.shape[1], lattice.group)
        for each in (lattice.scale, lattice.zero, lattice.offset)
    )
    place, gap = between((w - offset) / torch.where(scale == 0, torch.inf, scale) + zero, lattice.levels)
    last = lattice.levels.shape[1] - 1
    low = place.floor().clamp_(0, max(0, last - 1))
    start = (place - low).clamp_(0, 1)
    levels = lattice.levels.expand(len(w), -1).gather(1, low.long())
    base, step = (levels - zero) * scale + offset - w, gap * scale
    up = relaxed(base, step, start, stats.wanted(w), stats.hessian, iterations, rate, strength) >= 0.5
    ladder = Ladder(w, stats.held)
    ladder.offer("rounding", fmt.encode(w, grid), grid, fmt)
    ladder.offer("adaround", lattice.codes[(low.int() + up).clamp_(max=last)], grid, fmt)
    return replace(solution(w, ladder.codes, grid, fmt, stats), steps=tuple(ladder.steps))


def relaxed(
    base: Tensor,
    step: Tensor,
    start: Tensor,
    missed: Tensor,
    hessian: Tensor,
    iterations: int,
    rate: float,
    strength: float,
) -> Tensor:
    """h (out, in) of the least sum of ((base + h step) x - missed)^2 that is driven to 0 or 1.

    base: the lower level less the weight; step: up to the higher one; start: h to begin with, those at an end stay
    there; missed (out, in): E[m x^T] of what the exact weight lacks, hessian (in, in): E[x x^T], both by any factor.
    """
    free = (start > 0) & (start < 1)
    nearest = base + start.round() * step
    unit = float((nearest.square() * hessian.diagonal()).sum()) / max(1, int(free.sum()))  # what a weight loses
    v = torch.logit((start - BELOW) / STRETCH)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for count in range(1, iterations + 1 if unit else 0):
        sigmoid = v.sigmoid()
        h = (STRETCH * sigmoid + BELOW).clamp_(0, 1)
        gradient = torch.addcmul(base, h, step) @ hessian
        gradient.sub_(missed).mul_(step).mul_(2 / unit)
        late = ((count - 1) / iterations - FREE) / (1 - FREE)
        if late >= 0:
            b = 20 - 18 * late
            apart = 2 * h - 1
            gradient.sub_(apart.sign() * apart.abs().pow_(b - 1), alpha=2 * b * strength)
        gradient.mul_(sigmoid.mul_(1 - sigmoid)).mul_(STRETCH).mul_(free & (h > 0) & (h < 1))
        first.lerp_(gradient, 1 - MOMENTS[0])
        second.lerp_(gradient.square_(), 1 - MOMENTS[1])
        root = (second / (1 - MOMENTS[1] ** count)).sqrt_().add_(1e-8)
        v.addcdiv_(first, root, value=-rate / (1 - MOMENTS[0] ** count))
    return (STRETCH * v.sigmoid() + BELOW).clamp_(0, 1)
