"""GPTQ with an asymmetric target, then coordinate descent: rounding errors are moved to where they hurt least.

The weight is rounded column by column, and what each rounding lost is spread over the columns still to come
(E. Frantar et al., "GPTQ", arXiv:2210.17323; the same as LDLQ of J. Chee et al., "QuIP", arXiv:2307.13304, section 3).
Three things are added:

target   The inputs x of the quantized model are not those, x_ref, that the original weight was made for, and the
         residual stream that the output is added to lacks some d already. What minimizes |Q x - W x_ref - d|^2 is as
         near as can be, in the metric of the Hessian, to W* = W + E[(W (x_ref - x) + d) x^T] (H + l diag H)^-1 with
         H = E[x x^T]. How far to go towards W* is chosen on tokens that none of the sums contains; l is the damping.
refit    With all codes as they are the best scale of a group is known in closed form; it is taken where it still is
         better after rounding to its stored type.
descent  With all scales and all other codes as they are the best value of one code is known: column by column, as often
         as asked. Groups are refit when their turn comes, from the same gradient.

Every step is judged on held-out tokens and taken back where it made things worse. Where the curvature G of the loss in
the outputs is known, descent goes on from there on tr(G D H D^T), in which errors of different outputs make up for each
other. What comes of it has a larger error of its own, and may be far worse if G is wrong: it is offered as a rival,
for the block to decide.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmquant.formats import Format, Grid
from llmquant.formats.base import Lattice, gaps
from llmquant.solvers import coarse, loops, refit
from llmquant.solvers.algebra import Metric, metric, of_columns, product
from llmquant.solvers.base import Solution, Step
from llmquant.stats import Held, Stats, energy, row_energy

WIDE = 512  # columns of a group beyond which its scale is not refit block by block
# Added to the diagonal of G, as a fraction of its mean. A twentieth of it can destroy a model while all of the solver's
# own figures improve: rows that the loss hardly feels are spent on others. Half of it costs 5 % of KL on one model, and
# gains less than 1 % on another.
OUTPUT_DAMP = 0.6
OUTPUT_SWEEPS = 4
ROW_LIMIT = 2.0  # times the loss that a row had before, beyond which it stays as it was


def solve(
    w: Tensor,
    stats: Stats | None,
    fmt: Format,
    *,
    clip: str = "search",
    damp: float = 0.03,
    target: bool = True,
    rounds: int = 2,
    starts: int = 1,
    exponents: bool = False,
    lean: bool = False,
) -> Solution:
    """w (out, in) float32. Raises what Format.fit raises, and ValueError without calibration.

    clip: the format's named rule for the range; damp: the fraction by which the Hessian's diagonal is raised;
    target: aim at W* where held-out tokens agree; rounds: of refit and descent after the sweep; starts: grids that all
    of this is done from, up to 3, of which every row keeps the best; exponents: choose coarse scales again, which
    lowers the loss, but not always what it does to a model; lean: whether the solution says how far from its level
    each weight would best be, for tuning to start from.
    """
    if stats is None:
        raise ValueError("gptq needs calibration")
    ladder = Ladder(w, stats.held)
    importance = stats.importance()
    ladder.offer("rounding", *fmt.quantize(w, importance, clip=clip), fmt)
    aim = aimed(w, stats, damp, ladder.missed) if target else w
    felt = metric(stats, damp)
    from_grid = partial(_from_grid, aim, fmt=fmt, felt=felt, rounds=rounds, exponents=exponents)
    places, grid = from_grid(fmt.fit(aim, importance, clip=clip), ladder=ladder)
    others = [(None, clip), (None, "minmax")][: starts - 1]
    for weights, rule in others:
        other = from_grid(fmt.fit(aim, weights, clip=rule), ladder=None)
        places, grid = _best_rows(aim, felt.hessian, fmt, (places, grid), other)
    if others:
        ladder.offer("starts", fmt.lattice(grid).codes[places.int()], grid, fmt)
    hessian, found = felt.hessian, row_losses(w, ladder.codes, ladder.grid, fmt, stats)
    best = Solution(ladder.codes, ladder.grid, stats.mean(found), tuple(ladder.steps))
    if stats.last:
        stats.shared.clear()
        del felt, from_grid  # as large as the Hessian
    if stats.curvature is not None and rounds:
        before = found if ladder.steps[-1].kept else None
        best = replace(best, rival=two_sided(w, aim, places, grid, fmt, hessian, stats, before))
    return _leaning(best, aim, fmt, hessian) if lean else best


def _from_grid(
    aim: Tensor, grid: Grid, fmt: Format, felt: Metric, rounds: int, exponents: bool, ladder: Ladder | None
) -> tuple[Tensor, Grid]:
    """Sweep, refit and descend: places and grid. What each step finds is offered to the ladder, if there is one."""

    def offer(name: str) -> None:
        if ladder is not None:
            ladder.offer(name, fmt.lattice(grid).codes[places.int()], grid, fmt)

    places = sweep(aim, felt, fmt.lattice(grid))
    offer("sweep")
    together = len(grid.scale) == len(aim) and grid.group <= WIDE  # refit and descent, block by block
    for round in range(rounds):
        if not together:
            grid = refit.scales(aim, places, grid, fmt, felt.hessian)
        if grid.levels is not None:
            grid, places = refit.tables(aim, places, grid, fmt, felt.hessian)
        if exponents:
            grid, places = coarse.choose(aim, places, grid, fmt, felt.hessian)
        if together:
            grid, places = refine(aim, places, grid, fmt, felt.hessian)
        else:
            places, _ = loops.descend(aim, places, fmt.lattice(grid), felt.hessian)
        offer(f"descent {round + 1}")
    if rounds and (not together or grid.levels is not None):
        grid, places = refit.refit(aim, places, grid, fmt, felt.hessian)
        offer("refit")
    return places, grid


def refine(w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor) -> tuple[Grid, Tensor]:
    """One descent in which the scale of every group is refit when its turn comes: grid and places (out, in)."""
    grid = replace(grid, scale=grid.scale.clone())

    def stored(scale: Tensor, group: int) -> Tensor:
        return fmt.storable(scale, grid, group)

    places, _ = loops.descend(w, places, fmt.lattice(grid), hessian, stored=stored)
    return grid, places


def _best_rows(
    aim: Tensor, hessian: Tensor, fmt: Format, one: tuple[Tensor, Grid], other: tuple[Tensor, Grid]
) -> tuple[Tensor, Grid]:
    """Of two solutions, places and grid, every row of the one that loses less; all rows where they share a scale."""
    losses = []
    for places, grid in (one, other):
        missed = fmt.decode(fmt.lattice(grid).codes[places.int()], grid).sub_(aim)
        losses.append(row_energy(missed, hessian))
    better = losses[1] < losses[0]
    mixed = one[1].rows_of(other[1], better)
    if mixed is None:
        return other if losses[1].sum(dtype=torch.float64) < losses[0].sum(dtype=torch.float64) else one
    return torch.where(better.unsqueeze(1), other[0], one[0]), mixed


def _leaning(found: Solution, aim: Tensor, fmt: Format, hessian: Tensor) -> Solution:
    """With what coordinate descent would move each weight by, all others as they are, if levels were everywhere."""
    missed = fmt.decode(found.codes, found.grid).sub_(aim).neg_()
    levels = fmt.lattice(found.grid).levels
    gap = of_columns(found.grid.scale, aim.shape[1], found.grid.group) * gaps(levels)
    lean = product(missed, hessian).div_(hessian.diagonal()).div_(gap).nan_to_num_(0.0).clamp_(-1, 1)
    rival = found.rival and _leaning(found.rival, aim, fmt, hessian)
    return replace(found, lean=lean.half(), rival=rival)


def solution(w: Tensor, codes: Tensor, grid: Grid, fmt: Format, stats: Stats) -> Solution:
    return Solution(codes, grid, stats.mean(row_losses(w, codes, grid, fmt, stats)))


def row_losses(w: Tensor, codes: Tensor, grid: Grid, fmt: Format, stats: Stats) -> Tensor:
    """What every row loses of its outputs (out,), summed over tokens."""
    return row_energy(fmt.decode(codes, grid).sub_(w), stats.hessian)


def two_sided(
    w: Tensor,
    aim: Tensor,
    places: Tensor,
    grid: Grid,
    fmt: Format,
    hessian: Tensor,
    stats: Stats,
    before: Tensor | None = None,
) -> Solution:
    """What descent on tr(G D H D^T) finds, D = Q - aim, with scales as they are and G in blocks (blocks, b, b).

    before: the losses of rows (out,) at `places`, where these are known.
    Source: the curvature of K-FAC (arXiv:1503.05671) as the metric of rounding, as in A. Tseng et al., "YAQA",
    arXiv:2505.22988.
    """
    curvature = stats.curvature
    assert curvature is not None
    lattice = fmt.lattice(grid)
    mean = curvature.diagonal(dim1=1, dim2=2).mean()
    raised = curvature + OUTPUT_DAMP * mean * torch.eye(curvature.shape[1], device=curvature.device)
    found, _ = loops.descend(aim, places, lattice, hessian, raised, sweeps=OUTPUT_SWEEPS)
    codes, old = lattice.codes[found.int()], lattice.codes[places.int()]
    before = row_losses(w, old, grid, fmt, stats) if before is None else before
    after = row_losses(w, codes, grid, fmt, stats)
    spent = after > ROW_LIMIT * before
    codes[spent] = old[spent]
    return Solution(codes, grid, stats.mean(torch.where(spent, before, after)))


class Ladder:
    """The best solution so far, as judged on held-out tokens; without any the last one offered is the best."""

    codes: Tensor
    grid: Grid

    def __init__(self, w: Tensor, held: Held | None) -> None:
        self.w, self.held = w, held
        self.missed = None if held is None else held.missed(w)
        if held is not None:
            self.wanted = max(energy(held.x_ref @ w.T), 1e-30)
        self.best = float("inf")
        self.steps: list[Step] = []

    def offer(self, name: str, codes: Tensor, grid: Grid, fmt: Format) -> None:
        error = float("nan")
        if self.held is not None and self.missed is not None:  # |Q x - W x_ref - debt| over |W x_ref|
            change = fmt.decode(codes, grid).sub_(self.w)
            error = float((energy(product(self.held.x, change.T).sub_(self.missed)) / self.wanted) ** 0.5)
        kept = not error >= self.best
        self.steps.append(Step(name, error, kept))
        if kept:
            self.codes, self.grid, self.best = codes, grid, error


def aimed(w: Tensor, stats: Stats, damp: float, missed: Tensor | None) -> Tensor:
    """w + a (W* - w), with the a in [0, 1] of least loss on held-out tokens; missed (tokens, out): see Held."""
    held = stats.held
    if held is None or missed is None or not w.any():  # a matrix of zeros adds nothing, and should not begin to
        return w
    cross, wanted = stats.spend()
    wanted = product(w, cross, wanted)  # (out, in)
    del cross  # before there are more matrices as large as the Hessian
    change = metric(stats, damp).solved(wanted)
    effect = product(held.x, change.T)
    overlap = float(torch.linalg.vecdot(effect, missed).sum(dtype=torch.float64))
    step = min(1.0, max(0.0, overlap / max(energy(effect), 1e-30)))
    return change.mul_(step).add_(w)


def sweep(w: Tensor, felt: Metric, lattice: Lattice) -> Tensor:
    """Places (out, in) uint8 of the levels chosen, columns of large diagonal first, the grid fixed beforehand."""
    error = torch.empty_like(w)  # its columns in the order they are visited
    places = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    for start in range(0, w.shape[1], loops.BLOCK):
        here = slice(start, min(start + loops.BLOCK, w.shape[1]))
        columns, mix = felt.order[here], felt.factor[: here.stop, here]
        mix = mix / mix[start:].diagonal()
        state = product(error[:, :start], mix[:start], alpha=-1)
        places[:, columns], error[:, here] = loops.gptq_block(w[:, columns], state, mix[start:], lattice, columns)
    return places
