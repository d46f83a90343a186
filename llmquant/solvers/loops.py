"""The two loops that round one column after the other: the sweep of GPTQ, and coordinate descent on codes.

Both round a block of columns one by one, all rows at once, and correct the columns still to come. They are one loop:
an element is rounded from its base as far as the state of row r and column j says, and what it has moved by is then
taken from the states of later columns.

    GPTQ      the base is the weight. With H = R D R^T, R upper with ones along the diagonal and D diagonal, the state
              is -sum over i < j of r_ij times the error of column i (LDLQ, arXiv 2307.13304, theorem 6: the same as
              algorithm 1 of arXiv 2210.17323, without an inverse).
    descent   the base is the value as it is, the state the step to the least tr(G D H D^T), D = Q - W, along that
              element alone. What element (s, i) moves by takes h_ij / h_jj from the steps of its own row, g_st / g_tt
              times as much from those of row t.

In a descent that refits, the scale of each group is first set to that of least loss for its codes as they are.

On a CPU the loop is compiled by numba, at the first call, and kept on disk; elsewhere it is one of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from llmquant.formats.base import Lattice
from llmquant.products import TERMS, product, runs
from llmquant.solvers.algebra import PANEL, arrange

# Rows that a thread works on at a time: 32 KB of a block of 128 columns, which stay in the first cache.
ROWS_TOGETHER = 64
BLOCK = 128  # columns whose errors are spread at once
TINY = 2.0**-100  # in place of a curvature of zero, along which nothing is to be gained
SPARSE = 6  # a matrix of which at most one element in so many is not zero is multiplied by these alone


@dataclass(frozen=True)
class Rounding:
    """A lattice, prepared for a block of k columns."""

    levels: Tensor  # (1 or out, K), ascending
    middles: Tensor  # (1 or out, K - 1), between the levels
    step: float  # the levels are step * lowest, step * (lowest + 1), ..; 0: they are not
    lowest: float
    scale: Tensor  # (1 or out, groups)
    zero: Tensor  # (1 or out, groups)
    offset: Tensor  # (1 or out, groups)
    group: Tensor  # (k,) int64, of each column

    def values(self, places: Tensor, column: int | slice) -> Tensor:
        """What places (out, ..) uint8 of these columns stand for."""
        scale, zero, offset = self._of(column)
        levels = self.levels.expand(len(places), -1)
        found = levels.gather(1, places.reshape(len(places), -1).long()).view(places.shape)
        return (found - zero) * scale + offset

    def nearest(self, x: Tensor, column: int) -> Tensor:
        """The places (out,) of the levels nearest to x (out,). Of two the even one, but in tables the lower."""
        scale, zero, offset = self._of(column)
        x = (x - offset) / scale.where(scale != 0, torch.inf) + zero
        if self.step:
            place = ((x / self.step).round() - self.lowest).nan_to_num(0.0)
            return place.clamp(0, self.levels.shape[1] - 1).to(torch.uint8)
        return (x.unsqueeze(1) > self.middles).sum(1, dtype=torch.uint8)

    def columns(self, columns: slice) -> Rounding:
        return replace(self, group=self.group[columns])

    def _of(self, column: int | slice) -> tuple[Tensor, Tensor, Tensor]:
        group = self.group[column]
        return self.scale[:, group], self.zero[:, group], self.offset[:, group]


def _rounding(lattice: Lattice, columns: Tensor) -> Rounding:
    levels = lattice.levels.float()
    step, lowest = _spacing(levels)
    nought = lattice.scale.new_zeros(1, 1).expand(1, lattice.scale.shape[1])
    return Rounding(
        levels,
        (levels[:, 1:] + levels[:, :-1]) / 2,
        step,
        lowest,
        lattice.scale,
        nought if lattice.zero is None else lattice.zero,
        nought if lattice.offset is None else lattice.offset,
        columns // lattice.group,
    )


def _spacing(levels: Tensor) -> tuple[float, float]:
    """(step, lowest) where the levels are step times integers that follow each other, else (0, 0)."""
    if levels.shape[0] != 1 or levels.shape[1] < 2:
        return 0.0, 0.0
    first, second = levels[0, :2].tolist()
    step = second - first
    lowest = round(first / step) if step else 0
    even = torch.arange(lowest, lowest + levels.shape[1], device=levels.device) * step
    return (step, float(lowest)) if torch.equal(even.float(), levels[0]) else (0.0, 0.0)


Array = np.ndarray
# sweep(state, base, mix, rounding, places, coupling, turns, free) -> moved: rounds k columns.
#   state (out, k) float32: what is added to an element's base before it is rounded; overwritten
#   base (out, k) float32, or None: the values of the places
#   mix (k, k) float32: what moving column i takes from the state of column j > i
#   places (out, k) uint8: overwritten
#   coupling (blocks, b, b) float32, turns (blocks, b) int64, or None: see _coupled
#   free (out,) bool: rows whose places may change
#   moved (out, k): by how much each element is away from its base
Sweep = Callable[[Tensor, Tensor | None, Tensor, Rounding, Tensor, Tensor | None, Tensor | None, Tensor], Tensor]
# stored(scale, group): the scales nearest to `scale` (out,) that a file can hold for this group.
Stored = Callable[[Tensor, int], Tensor]


def gptq_block(
    w: Tensor, state: Tensor, mix: Tensor, lattice: Lattice, columns: Tensor, *, sweep: Sweep | None = None
) -> tuple[Tensor, Tensor]:
    """Round the k columns w (out, k) float32 one by one, each making up for the errors of those before it.

    state (out, k) float32: what the columns before these ask for; overwritten. mix (k, k): R, restricted to the block.
    columns (k,) int64: which columns of the lattice these are. Returns places (out, k) uint8 and the errors Q - w.
    """
    places = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    free = torch.ones(len(w), dtype=torch.bool, device=w.device)
    moved = (sweep or _sweep_for(w))(state, w, mix, _rounding(lattice, columns), places, None, None, free)
    return places, moved


def descend(
    w: Tensor,
    places: Tensor,
    lattice: Lattice,
    hessian: Tensor,
    curvature: Tensor | None = None,
    *,
    felt: Tensor | None = None,
    sweeps: int = 1,
    block: int = BLOCK,
    rows: Tensor | None = None,
    stored: Stored | None = None,
    sweep: Sweep | None = None,
) -> tuple[Tensor, list[int]]:
    """Move one element after the other to the level that minimises tr(G D H D^T), D = Q - w, all others as they are.

    w (out, in) float32; places (out, in) uint8, where to start; hessian (in, in) float32, H. curvature: None for
    G = I, or (blocks, b, b) float32, the diagonal blocks of G over b rows each; the last may be cut short. rows (out,)
    bool: rows that may change. Columns go by descending H_cc, and the rows of a block by descending G_rr. Returns the
    places found and how many elements each sweep changed. The bits do not depend on the number of threads.

    felt: D H (out, in) float32 at `places`, where it is known; it becomes that at the places found.
    stored: for G = I alone, refit: the scales of `lattice` are overwritten, and whole groups go by their descending sum
    of H_cc, their columns as before.
    """
    sweep = sweep or _sweep_for(w)
    diagonal = hessian.diagonal().clamp(min=TINY)
    order = by_size(diagonal, None if stored is None else lattice.group)
    error = missed(w, places, lattice)
    felt = product(error, hessian) if felt is None else felt
    for each in (error, felt):
        arrange(each, order)
    rounding, places = _rounding(lattice, order), places.index_select(1, order)
    free = torch.ones(len(w), dtype=torch.bool, device=w.device) if rows is None else rows
    coupling, turns = (None, None) if curvature is None else _coupled(curvature, len(w))
    changes = []
    for _ in range(sweeps):
        before = places.clone()
        for panel in _panels(order, block, None if stored is None else lattice.group):
            whole = slice(panel[0].start, panel[-1].stop)
            near = hessian.index_select(0, order[whole]).index_select(1, order)  # (k, in)
            moved = error[:, whole].neg()
            for here in panel:
                at = slice(here.start - whole.start, here.stop - whole.start)
                bend, part = diagonal[order[here]], rounding.columns(here)
                steps, mix = felt[:, here] / -bend, near[at, here] / bend
                steps = steps if coupling is None else _product_of_blocks(steps, coupling)
                if stored is not None:
                    _refit(error[:, here], steps, mix, bend, part, places[:, here], free, stored)
                error[:, here] += sweep(steps, None, mix, part, places[:, here], coupling, turns, free)
                moved[:, at] += error[:, here]
                _spread(moved[:, at], near[at], felt, whole if len(panel) > 1 else slice(None))
            if len(panel) > 1:
                for rest in (slice(0, whole.start), slice(whole.stop, len(order))):
                    _spread(moved, near, felt, rest)
        changes.append(int(torch.count_nonzero(places != before)))
    back = order.argsort()
    arrange(felt, back)
    return places.index_select(1, back), changes


def missed(w: Tensor, places: Tensor, lattice: Lattice) -> Tensor:
    """Q - w (out, in), Q being the levels that the places (out, in) uint8 say."""
    error = torch.empty_like(w)
    for here in runs(0, w.shape[1], BLOCK):
        columns = torch.arange(here.start, here.stop, device=w.device)
        error[:, here] = _rounding(lattice, columns).values(places[:, here], slice(None)) - w[:, here]
    return error


def gradient(w: Tensor, places: Tensor, lattice: Lattice, hessian: Tensor) -> Tensor:
    """(Q - w) H (out, in), multiplied out."""
    return product(missed(w, places, lattice), hessian)


def by_size(diagonal: Tensor, group: int | None = None) -> Tensor:
    """The columns (in,) by descending entry of the diagonal; those of a group together, groups by descending sum."""
    order = diagonal.argsort(descending=True, stable=True)
    if group is None:
        return order
    of_group = torch.arange(len(diagonal), device=diagonal.device) // group
    sums = diagonal.new_zeros(int(of_group[-1]) + 1).index_add_(0, of_group, diagonal)
    rank = sums.argsort(descending=True, stable=True).argsort()
    return order[rank[of_group[order]].argsort(stable=True)]


def _panels(order: Tensor, block: int, group: int | None) -> Iterator[list[slice]]:
    """Runs of at most `block` columns; of whole groups, of at least one, where they go together.

    What the runs of a list change is spread to the columns outside of it in one product. Where scales are refit nearly
    all changes, and a list has some PANEL columns; elsewhere few do, and each run is by itself.
    """
    if group is None:
        yield from ([here] for here in runs(0, len(order), block))
        return
    ends = (order[1:] // group != order[:-1] // group).nonzero().flatten().add_(1).tolist()
    start = last = 0
    panel: list[slice] = []
    for end in [*ends, len(order)]:
        if end - start > block and last > start:
            panel.append(slice(start, last))
            start = last
            if start - panel[0].start >= PANEL:
                yield panel
                panel = []
        last = end
    yield [*panel, slice(start, last)]


def _refit(
    error: Tensor,
    steps: Tensor,
    mix: Tensor,
    diagonal: Tensor,
    rounding: Rounding,
    places: Tensor,
    free: Tensor,
    stored: Stored,
) -> None:
    """Group after group the scale of least loss for the codes as they are, kept where its stored value is better.

    All that is given is of one block of columns; errors, steps and the rounding's scales are changed.
    """
    for group in rounding.group.unique_consecutive().tolist():
        at = (rounding.group == group).nonzero().flatten()
        at = slice(int(at[0]), int(at[-1]) + 1)
        of_scale = rounding.levels.expand(len(places), -1).gather(1, places[:, at].long())
        of_scale -= rounding.zero[:, group, None]
        felt = of_scale @ mix[at]  # (out, k)
        bend = (felt[:, at] * of_scale) @ diagonal[at]
        slope = (steps[:, at] * of_scale) @ diagonal[at]
        scale = rounding.scale[:, group]
        wanted = stored(torch.where(bend > 0, scale + slope / bend, scale), group)
        change = wanted - scale
        better = free & torch.isfinite(change) & (change * (change * bend - 2 * slope) < 0)
        change = torch.where(better, change, 0.0)
        scale.copy_(torch.where(better, wanted, scale))  # scale + change need not be what a file can hold
        error[:, at].addcmul_(of_scale, change[:, None])
        steps.addcmul_(felt, change[:, None], value=-1)


def _spread(moved: Tensor, near: Tensor, felt: Tensor, columns: slice) -> None:
    """Add moved (out, k) @ near (k, in) to these columns of felt (out, in).

    Few codes change in one sweep, and zeros are passed over where that is faster.
    """
    if felt.device.type != "cpu" or int(moved.count_nonzero()) * SPARSE > moved.numel():
        product(moved, near[:, columns], felt[:, columns])
    else:
        arrays = [tensor.numpy() for tensor in (moved.contiguous(), near.contiguous(), felt)]
        start, stop, _ = columns.indices(felt.shape[1])
        _in_threads(len(felt), partial(_compiled(_spread_rows, SPREAD), *arrays, start, stop))


def _coupled(curvature: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What moving row s takes from row t, g_st / g_tt, and the rows of every block by descending g_tt."""
    blocks, width, _ = curvature.shape
    curvature = curvature.clone()
    short = rows - (blocks - 1) * width
    curvature[-1, short:] = curvature[-1, :, short:] = 0.0  # rows that do not exist: their turn comes last
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    turns = diagonal.argsort(dim=1, descending=True, stable=True)
    return curvature / diagonal.clamp(min=TINY).unsqueeze(1), turns


def _product_of_blocks(steps: Tensor, coupling: Tensor) -> Tensor:
    """What all rows of a block (b, k) together ask of each, for all row blocks of steps (out, k)."""
    blocks, width, _ = coupling.shape
    padded = torch.nn.functional.pad(steps, (0, 0, 0, blocks * width - len(steps))).view(blocks, width, -1)
    product = torch.zeros_like(padded)
    for left, right in zip(coupling.mT.split(TERMS, dim=2), padded.split(TERMS, dim=1), strict=True):
        product.baddbmm_(left, right)
    return product.view(blocks * width, -1)[: len(steps)]


def _sweep_for(w: Tensor) -> Sweep:
    return sweep_compiled if w.device.type == "cpu" else sweep_torch


# ---- the loop in torch


def sweep_torch(
    state: Tensor,
    base: Tensor | None,
    mix: Tensor,
    rounding: Rounding,
    places: Tensor,
    coupling: Tensor | None,
    turns: Tensor | None,
    free: Tensor,
) -> Tensor:
    """See Sweep. All row blocks at once, one row of each after the other; without coupling all rows at once."""
    if coupling is None or turns is None:
        coupling, turns = state.new_ones(len(state), 1, 1), free.new_zeros(len(state), 1, dtype=torch.int64)
    blocks, width, _ = coupling.shape
    at = torch.arange(blocks, device=state.device)
    moved = torch.zeros_like(state)
    for i in range(state.shape[1]):
        old = rounding.values(places[:, i], i) if base is None else base[:, i]
        taken = state.new_zeros(blocks, width)
        for turn in turns.unbind(1):
            rows = at * width + turn
            block = at[rows < len(state)]
            turn, rows = turn[block], rows[block]
            goal = old + state[:, i] - taken.view(-1)[: len(state)]
            place = torch.where(free, rounding.nearest(goal, i), places[:, i])
            value = rounding.values(place, i)
            move = (value - old)[rows]
            places[rows, i], moved[rows, i] = place[rows], move
            taken[block] += coupling[block, turn] * move.unsqueeze(1)
        state[:, i + 1 :] -= taken.view(-1)[: len(state), None] * mix[i, i + 1 :]
    return moved


# ---- the loop compiled


def sweep_compiled(
    state: Tensor,
    base: Tensor | None,
    mix: Tensor,
    rounding: Rounding,
    places: Tensor,
    coupling: Tensor | None,
    turns: Tensor | None,
    free: Tensor,
) -> Tensor:
    """See Sweep. Threads share the rows; each takes whole row blocks, so that their number does not change a bit."""
    moved = torch.empty_like(state)
    height = len(state)
    if coupling is None or turns is None:
        coupling, turns = state.new_empty(0, 0, 0), free.new_empty(0, 0, dtype=torch.int64)
    width = coupling.shape[1] or ROWS_TOGETHER
    tensors = [state, state.new_empty(0, 0) if base is None else base, mix.contiguous(), places, moved]
    tensors += [rounding.levels.expand(height, -1), rounding.middles.contiguous()]
    tensors += [x.expand(height, -1) for x in (rounding.scale, rounding.zero, rounding.offset)]
    tensors += [rounding.group, coupling.contiguous(), turns.contiguous(), free]
    arrays = [tensor.numpy() for tensor in tensors]
    tile = width * max(1, ROWS_TOGETHER // width)
    work = partial(_compiled(_sweep_rows, SWEEP), *arrays, rounding.step, rounding.lowest, width)
    _in_threads(-(-height // tile), work)
    return moved


def _in_threads(pieces: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, last) for as many runs of pieces as torch may use threads.

    Plain threads, since compiled code lets go of the interpreter: another pool of OpenMP's would keep the cores from
    torch's, whose threads wait spinning.
    """
    threads = min(torch.get_num_threads(), pieces)
    if threads == 1:
        return work(0, pieces)
    ends = [pieces * thread // threads for thread in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, ends[:-1], ends[1:]))


SWEEP = (
    "void(float32[:,:], float32[:,:], float32[:,::1], uint8[:,:], float32[:,:], float32[:,:], float32[:,::1],"
    "float32[:,:], float32[:,:], float32[:,:], int64[:], float32[:,:,::1], int64[:,::1], boolean[:], float32,"
    "float32, int64, int64, int64)"
)
SPREAD = "void(float32[:,::1], float32[:,::1], float32[:,::1], int64, int64, int64, int64)"


@cache
def _compiled(loop: Callable[..., None], signature: str) -> Callable[..., None]:
    import numba  # takes half a second, which who only loads a model need not wait

    # Python's rule, an error for a division by zero, would keep the loops from being vectorized.
    compiler = partial(numba.njit, signature, nogil=True, error_model="numpy", fastmath={"contract"})
    try:
        return compiler(cache=True)(loop)
    except RuntimeError:  # nowhere to keep it
        return compiler()(loop)


def _spread_rows(moved: Array, near: Array, felt: Array, start: int, stop: int, first: int, last: int) -> None:
    """Rows first..last of what `_spread` adds. numba compiles this."""
    for r in range(first, last):
        own = felt[r, start:stop]
        for c in range(len(near)):
            by = moved[r, c]
            if by != 0:
                along = near[c, start:stop]
                for j in range(len(own)):
                    own[j] += by * along[j]


def _sweep_rows(
    state: Array,
    base: Array,
    mix: Array,
    places: Array,
    moved: Array,
    levels: Array,
    middles: Array,
    scale: Array,
    zero: Array,
    offset: Array,
    group: Array,
    coupling: Array,
    turns: Array,
    free: Array,
    step: float,
    lowest: float,
    width: int,
    first: int,
    last: int,
) -> None:
    """Sweep over the tiles first..last of rows, each of some row blocks of `width`. numba compiles this; see Sweep."""
    count, top = len(mix), np.float32(levels.shape[1] - 1)
    none, endless, coupled, based = np.float32(0), np.float32(np.inf), len(coupling) > 0, len(base) > 0
    height = width * max(1, ROWS_TOGETHER // width)
    tile = np.empty((count, height), np.float32)  # the rows' part of the state, in cache
    s, z, o = np.empty(height, np.float32), np.empty(height, np.float32), np.empty(height, np.float32)
    taken = np.empty(height, np.float32)
    goal, old, move = np.empty(height, np.float32), np.empty(height, np.float32), np.empty(height, np.float32)
    found = np.empty(height, np.int64)
    for start in range(first * height, min(last * height, len(state)), height):
        size = min(height, len(state) - start)
        own_state, own_places, own_moved = state[start:], places[start:], moved[start:]
        own_levels, own_middles = levels[start:], middles[start if len(middles) > 1 else 0 :]
        for r in range(size):
            for i in range(count):
                tile[i, r] = own_state[r, i]
        for i in range(count):
            g = group[i]
            for r in range(size):
                s[r], z[r], o[r] = scale[start + r, g], zero[start + r, g], offset[start + r, g]
                if based:
                    old[r] = base[start + r, i]
                else:
                    old[r] = (own_levels[r, own_places[r, i]] - z[r]) * s[r] + o[r]
                goal[r] = old[r] + tile[i, r]
                taken[r] = none
            for top_row in range(0, size, width):
                end = min(top_row + width, size)
                near, block = taken[top_row:end], (start + top_row) // width
                for turn in range(end - top_row if coupled else 1):
                    low, high = top_row, end  # rows that are independent, all at once
                    if coupled:
                        low = top_row + turns[block, turn]
                        high = low + 1
                    for r in range(low, high):
                        goal[r] -= taken[r]
                        x = (goal[r] - o[r]) / (s[r] if s[r] != 0 else endless) + z[r]
                        if step != 0:
                            at = np.rint(x / step) - lowest
                            found[r] = np.int32(top if at >= top else at if at > 0 else none)  # NaN: 0
                        else:
                            between, place = own_middles[r if len(middles) > 1 else 0], 0
                            for k in range(len(between)):
                                place += x > between[k]
                            found[r] = place
                    for r in range(low, high):
                        place = found[r] if free[start + r] else own_places[r, i]
                        own_places[r, i] = place
                        value = (own_levels[r, place] - z[r]) * s[r] + o[r]
                        move[r] = value - old[r]
                        own_moved[r, i] = move[r]
                        taken[r] = taken[r] if coupled else move[r]
                    if coupled and move[low] != 0:
                        along, by = coupling[block, low - top_row], move[low]
                        for t in range(len(near)):
                            near[t] += along[t] * by
            for j in range(i + 1, count):
                later, by = tile[j], mix[i, j]
                for r in range(size):
                    later[r] -= by * taken[r]
