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

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from llmquant.formats import Format, Grid
from llmquant.formats.base import Lattice, gaps
from llmquant.products import product, runs
from llmquant.solvers import coarse, loops, refit
from llmquant.solvers.algebra import PANEL, Metric, arrange, damped, metric, of_columns
from llmquant.solvers.base import Solution, Step
from llmquant.stats import Held, Stats, energy, row_energy

ROWS = 256  # of which energies, and codes, are found at once
MORE = 0.06  # of the loss that a round of refit and descent has to take for another one to follow
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
    target: aim at W* where held-out tokens agree; rounds: of refit and descent after the sweep, at most; starts: grids
    that all of this is done from, up to 3, of which every row keeps the best; exponents: choose coarse scales again,
    which lowers the loss, but not always what it does to a model; lean: whether the solution says how far from its
    level each weight would best be, for tuning to start from.
    """
    if stats is None:
        raise ValueError("gptq needs calibration")
    ladder = Ladder(w, stats.held)
    importance = stats.importance()
    ladder.offer("rounding", *fmt.quantize(w, importance, clip=clip), fmt)
    aim = aimed(w, stats, damp, ladder.missed) if target else Aim.plain(w)
    felt = metric(stats, damp)
    rules = [(importance, clip), (None, clip), (None, "minmax")][: max(1, starts)]
    grids = [fmt.fit(aim.at, weights, clip=rule) for weights, rule in rules]
    swept = [Rounded(grid, *sweep(aim.at, felt, fmt.lattice(grid))) for grid in grids]
    del felt  # its factor is as large as the Hessian
    if stats.last:
        stats.shared.clear()
    hessian = damped(stats.hessian, damp)
    descended = partial(_descended, aim.at, fmt=fmt, hessian=hessian, rounds=rounds, exponents=exponents)
    found = descended(swept.pop(0), ladder=ladder)
    while swept:
        found = _best_rows(aim.at, fmt, found, descended(swept.pop(0), ladder=None))
    if len(grids) > 1:
        ladder.offer("starts", found.codes(fmt), found.grid, fmt)
    losses = aim.losses(found, fmt, stats, hessian)
    leaning = _leaning(found.felt, found.grid, fmt, hessian) if lean else None
    best = Solution(ladder.codes, ladder.grid, stats.mean(losses), tuple(ladder.steps), lean=leaning)
    if not ladder.steps[-1].kept:
        best = replace(best, loss=solution(w, best.codes, best.grid, fmt, stats).loss)
        if lean:
            missed = fmt.decode(best.codes, best.grid).sub_(aim.at)
            best = replace(best, lean=_leaning(product(missed, hessian), best.grid, fmt, hessian))
    if stats.curvature is not None and rounds:
        best = replace(best, rival=two_sided(aim, found, fmt, hessian, stats, losses, leaning))
    return best


@dataclass
class Rounded:
    """A weight as it is rounded so far, and the gradient there.

    grid; places (out, in) uint8 of its levels; felt (out, in) float32: D H, D = Q - W* and H damped. As long as it is
    kept up to date no step has to multiply by H again, nor has who asks what was lost.
    """

    grid: Grid
    places: Tensor
    felt: Tensor

    def codes(self, fmt: Format) -> Tensor:
        codes = fmt.lattice(self.grid).codes
        return torch.cat([codes[rows.int()] for rows in self.places.split(ROWS)])  # indices of 64 bits, for a few rows

    def energies(self, aim: Tensor, fmt: Format) -> Tensor:
        """D H D^T of every row (out,), with D = Q - aim."""
        error = loops.missed(aim, self.places, fmt.lattice(self.grid))
        return torch.cat(
            [torch.linalg.vecdot(a, b) for a, b in zip(error.split(ROWS), self.felt.split(ROWS), strict=True)]
        )


@dataclass(frozen=True)
class Aim:
    """What to round: w (out, in), at: W* (out, in), and apart (out,): the energy of W* - w in the damped Hessian."""

    w: Tensor
    at: Tensor
    apart: Tensor

    @classmethod
    def plain(cls, w: Tensor) -> Aim:
        return cls(w, w, w.new_zeros(len(w)))

    def losses(self, found: Rounded, fmt: Format, stats: Stats, hessian: Tensor) -> Tensor:
        """What every row loses of its outputs (out,), summed over tokens: (Q - w) H (Q - w)^T, from the gradient.

        hessian: the damped one, of which what was added is taken off again.
        """
        error = loops.missed(self.w, found.places, fmt.lattice(found.grid))
        added = (hessian.diagonal() - stats.hessian.diagonal()).clamp_min_(0)
        total = self.apart.clone()
        for rows in runs(0, len(error), ROWS):
            own = error[rows]
            total[rows] += torch.linalg.vecdot(own + self.at[rows] - self.w[rows], found.felt[rows])
            total[rows] -= torch.linalg.vecdot(own * added, own)
        return total.clamp_min_(0)


def _descended(
    aim: Tensor, found: Rounded, fmt: Format, hessian: Tensor, rounds: int, exponents: bool, ladder: Ladder | None
) -> Rounded:
    """Refit and descend from what the sweep has left. The ladder, if there is one, is offered what each step finds."""

    def offer(name: str) -> None:
        if ladder is not None:
            ladder.offer(name, found.codes(fmt), found.grid, fmt)

    offer("sweep")
    grid, places, felt = found.grid, found.places, found.felt
    together = len(grid.scale) == len(aim) and grid.group <= WIDE  # refit and descent, block by block
    before = 0.0
    for round in range(rounds):
        lost = float(found.energies(aim, fmt).sum(dtype=torch.float64))
        if round and not lost < (1 - MORE) * before:
            break
        before = lost
        if not together:
            grid = refit.scales(aim, places, grid, fmt, hessian, felt)
        if grid.levels is not None:
            grid, places = refit.tables(aim, places, grid, fmt, hessian)
            felt = loops.gradient(aim, places, fmt.lattice(grid), hessian)
        if exponents:
            grid, places = coarse.choose(aim, places, grid, fmt, hessian, felt)
        if together:
            grid, places = refine(aim, places, grid, fmt, hessian, felt)
        else:
            places, _ = loops.descend(aim, places, fmt.lattice(grid), hessian, felt=felt)
        found = Rounded(grid, places, felt)
        offer(f"descent {round + 1}")
    if rounds and (not together or grid.levels is not None):
        grid, places = refit.refit(aim, places, grid, fmt, hessian)
        found = Rounded(grid, places, loops.gradient(aim, places, fmt.lattice(grid), hessian))
        offer("refit")
    return found


def refine(
    w: Tensor, places: Tensor, grid: Grid, fmt: Format, hessian: Tensor, felt: Tensor | None = None
) -> tuple[Grid, Tensor]:
    """One descent in which the scale of every group is refit when its turn comes: grid and places (out, in)."""
    grid = replace(grid, scale=grid.scale.clone())

    def stored(scale: Tensor, group: int) -> Tensor:
        return fmt.storable(scale, grid, group)

    places, _ = loops.descend(w, places, fmt.lattice(grid), hessian, felt=felt, stored=stored)
    return grid, places


def _best_rows(aim: Tensor, fmt: Format, one: Rounded, other: Rounded) -> Rounded:
    """Every row of the one that loses less; all rows where they share a scale."""
    first, second = one.energies(aim, fmt), other.energies(aim, fmt)
    better = second < first
    mixed = one.grid.rows_of(other.grid, better)
    if mixed is None:
        return other if second.sum(dtype=torch.float64) < first.sum(dtype=torch.float64) else one
    for mine, theirs in ((one.places, other.places), (one.felt, other.felt)):
        mine[better] = theirs[better]
    return replace(one, grid=mixed)


def _leaning(felt: Tensor, grid: Grid, fmt: Format, hessian: Tensor) -> Tensor:
    """What coordinate descent would move each weight by, all others as they are, if levels were everywhere: see
    Solution.
    """
    gap = of_columns(grid.scale, len(hessian), grid.group) * gaps(fmt.lattice(grid).levels)
    return (felt / -hessian.diagonal()).div_(gap).nan_to_num_(0.0).clamp_(-1, 1).half()


def solution(w: Tensor, codes: Tensor, grid: Grid, fmt: Format, stats: Stats) -> Solution:
    return Solution(codes, grid, stats.mean(row_losses(w, codes, grid, fmt, stats)))


def row_losses(w: Tensor, codes: Tensor, grid: Grid, fmt: Format, stats: Stats) -> Tensor:
    """What every row loses of its outputs (out,), summed over tokens."""
    return row_energy(fmt.decode(codes, grid).sub_(w), stats.hessian)


def two_sided(
    aim: Aim,
    start: Rounded,
    fmt: Format,
    hessian: Tensor,
    stats: Stats,
    before: Tensor,
    leaning: Tensor | None = None,
) -> Solution:
    """What descent on tr(G D H D^T) finds, D = Q - aim, with scales as they are and G in blocks (blocks, b, b).

    start: its gradient is overwritten; before: what its rows lose (out,); leaning: see Solution, of the start.
    Source: the curvature of K-FAC (arXiv:1503.05671) as the metric of rounding, as in A. Tseng et al., "YAQA",
    arXiv:2505.22988.
    """
    curvature = stats.curvature
    assert curvature is not None
    lattice, felt = fmt.lattice(start.grid), start.felt
    mean = curvature.diagonal(dim1=1, dim2=2).mean()
    raised = curvature + OUTPUT_DAMP * mean * torch.eye(curvature.shape[1], device=curvature.device)
    places, _ = loops.descend(aim.at, start.places, lattice, hessian, raised, felt=felt, sweeps=OUTPUT_SWEEPS)
    found = replace(start, places=places)
    after = aim.losses(found, fmt, stats, hessian)
    spent = after > ROW_LIMIT * before
    places[spent] = start.places[spent]
    if leaning is not None:
        leaning = torch.where(spent.unsqueeze(1), leaning, _leaning(felt, found.grid, fmt, hessian))
    return Solution(found.codes(fmt), found.grid, stats.mean(torch.where(spent, before, after)), lean=leaning)


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
        if self.held is not None and self.missed is not None:  # |Q x - W x - l| over |W x_ref|
            change = fmt.decode(codes, grid).sub_(self.w)
            error = float((energy(product(self.held.x, change.T).sub_(self.missed)) / self.wanted) ** 0.5)
        kept = not error >= self.best
        self.steps.append(Step(name, error, kept))
        if kept:
            self.codes, self.grid, self.best = codes, grid, error


def aimed(w: Tensor, stats: Stats, damp: float, missed: Tensor | None) -> Aim:
    """w + a (W* - w), with the a in [0, 1] of least loss on held-out tokens; missed (tokens, out): see Held."""
    held = stats.held
    if held is None or missed is None or not w.any():  # a matrix of zeros adds nothing, and should not begin to
        return Aim.plain(w)
    wanted = stats.wanted(w)
    change = metric(stats, damp).solved(wanted)
    effect = product(held.x, change.T)
    overlap = float(torch.linalg.vecdot(effect, missed).sum(dtype=torch.float64))
    step = min(1.0, max(0.0, overlap / max(energy(effect), 1e-30)))
    apart = torch.linalg.vecdot(change, wanted).mul_(step**2).clamp_min_(0)  # change H change^T
    return Aim(w, change.mul_(step).add_(w), apart)


def sweep(w: Tensor, felt: Metric, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Places (out, in) uint8 of the levels chosen, columns of large diagonal first, the grid fixed beforehand; and
    (Q - w) H (out, in), nearly half of which has been multiplied out by then.
    """
    factor, state = felt.factor, w.index_select(1, felt.order)  # columns in the order they are visited: w, then Q - w
    whitened = torch.zeros_like(w)  # (Q - w) U
    places = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    panels = runs(0, w.shape[1], PANEL)
    for panel in panels:
        product(state[:, : panel.start], factor[: panel.start, panel], whitened[:, panel])
        for here in runs(panel.start, panel.stop, loops.BLOCK):
            own, before = factor[here, here], slice(panel.start, here.start)
            product(state[:, before], factor[before, here], whitened[:, here])
            asked, mix = whitened[:, here] / -own.diagonal(), own / own.diagonal()
            part = state[:, here].clone()
            places[:, here], state[:, here] = loops.gptq_block(part, asked, mix, lattice, felt.order[here])
            product(state[:, here], own, whitened[:, here])
    for panel in panels:
        whitened[:, panel] = product(whitened[:, panel.start :], factor[panel, panel.start :].T)
    back = felt.order.argsort()
    arrange(whitened, back)
    return places.index_select(1, back), whitened
