"""The two loops that round one column after the other: the inner sweep of GPTQ, and coordinate descent on codes.

Both round a block of columns one by one, all rows at once, and correct the columns still to come. They are one loop
over a state of row r and column j, with different signs:

    GPTQ      the state is the weight as corrected so far; the error that rounding column i makes moves it by
              -u_ij / u_ii, where u is the upper factor of the inverse Hessian (arXiv 2210.17323, algorithm 1).
    descent   the state is the step to the least tr(G D H D^T), D = Q - W, along that element alone. What element (s, i)
              moves by takes h_ij / h_jj from the steps of its own row, g_st / g_tt times as much from those of row t.

On a CPU the loop is compiled by numba, at the first call, and kept on disk; elsewhere it is one of torch operations.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from llmquant.formats.base import Lattice

# Rows that a thread works on at a time: 32 KB of a block of 128 columns, which stay in the first cache.
ROWS_TOGETHER = 64
# Terms of a product that are added up in one go. How MKL cuts up longer sums depends on how many threads there are;
# up to 512 it does not cut, so that their number does not change a bit.
TERMS = 256
TINY = 2.0**-100  # in place of a curvature of zero, along which nothing is to be gained


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
# sweep(state, mix, rounding, places, coupling, turns, free, descent) -> moved: rounds k columns.
#   state (out, k) float32: overwritten; after GPTQ it holds each column as it was just before it was rounded
#   mix (k, k) float32: what moving column i takes from the state of column j > i
#   places (out, k) uint8: overwritten
#   coupling (blocks, b, b) float32, turns (blocks, b) int64, or None: see _coupled
#   free (out,) bool: rows whose places may change
#   moved (out, k): by how much each element moved in a descent, and in GPTQ what rounding took from it
Sweep = Callable[[Tensor, Tensor, Rounding, Tensor, Tensor | None, Tensor | None, Tensor, bool], Tensor]


def gptq_block(
    w: Tensor, u: Tensor, lattice: Lattice, columns: Tensor, *, sweep: Sweep | None = None
) -> tuple[Tensor, Tensor]:
    """Round the k columns w (out, k) float32 one by one, each making up for the errors of those before it.

    u (k, k): the upper factor of the inverse Hessian, restricted to the block; columns (k,) int64: which columns of the
    lattice these are. Returns places (out, k) uint8 and errors (out, k), by which the caller corrects later blocks:
    w[:, later] -= errors @ u[block, later]. In w every column keeps what it was just before it was rounded.
    """
    places = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    free = torch.ones(len(w), dtype=torch.bool, device=w.device)
    mix = u / u.diagonal().unsqueeze(1)
    moved = (sweep or _sweep_for(w))(w, mix, _rounding(lattice, columns), places, None, None, free, False)
    return places, moved.div_(u.diagonal())


def descend(
    w: Tensor,
    places: Tensor,
    lattice: Lattice,
    hessian: Tensor,
    curvature: Tensor | None = None,
    *,
    sweeps: int = 1,
    block: int = 128,
    rows: Tensor | None = None,
    sweep: Sweep | None = None,
) -> tuple[Tensor, list[int]]:
    """Move one element after the other to the level that minimises tr(G D H D^T), D = Q - w, all others as they are.

    w (out, in) float32; places (out, in) uint8, where to start; hessian (in, in) float32, H. curvature: None for
    G = I, or (blocks, b, b) float32, the diagonal blocks of G over b rows each; the last may be cut short. rows (out,)
    bool: rows that may change. Columns go by descending H_cc, and the rows of a block by descending G_rr. Returns the
    places found and how many elements each sweep changed. The bits do not depend on the number of threads.
    """
    sweep = sweep or _sweep_for(w)
    diagonal = hessian.diagonal().clamp(min=TINY)
    order = diagonal.argsort(descending=True, stable=True)
    rounding, places = _rounding(lattice, order), places[:, order]
    free = torch.ones(len(w), dtype=torch.bool, device=w.device) if rows is None else rows
    coupling, turns = (None, None) if curvature is None else _coupled(curvature, len(w))
    blocks = [slice(start, start + block) for start in range(0, w.shape[1], block)]
    error = torch.empty_like(w)  # D, its columns in the order they are visited
    for here in blocks:
        error[:, here] = rounding.columns(here).values(places[:, here], slice(None)) - w[:, order[here]]
    changes = []
    for _ in range(sweeps):
        before = places.clone()
        for here in blocks:
            own = order[here]
            mix = (hessian[own] / diagonal[own].unsqueeze(1))[:, order].T.contiguous()  # (in, k)
            # Afresh for each block, so that no error builds up: the objective fell sweep by sweep, in float32, with
            # Hessians of condition 3e9.
            steps = _product(error, mix).neg_()
            steps = steps if coupling is None else _product_of_blocks(steps, coupling)
            moved = sweep(steps, mix[here], rounding.columns(here), places[:, here], coupling, turns, free, True)
            error[:, here] += moved
        changes.append(int((places != before).sum()))
    return torch.empty_like(places).index_copy_(1, order, places), changes


def _coupled(curvature: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What moving row s takes from row t, g_st / g_tt, and the rows of every block by descending g_tt."""
    blocks, width, _ = curvature.shape
    curvature = curvature.clone()
    short = rows - (blocks - 1) * width
    curvature[-1, short:] = curvature[-1, :, short:] = 0.0  # rows that do not exist: their turn comes last
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    turns = diagonal.argsort(dim=1, descending=True, stable=True)
    return curvature / diagonal.clamp(min=TINY).unsqueeze(1), turns


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, the same bits for any number of threads."""
    product = a.new_zeros(len(a), b.shape[1])
    for left, right in zip(a.split(TERMS, dim=1), b.split(TERMS), strict=True):
        product.addmm_(left, right)
    return product


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
    mix: Tensor,
    rounding: Rounding,
    places: Tensor,
    coupling: Tensor | None,
    turns: Tensor | None,
    free: Tensor,
    descent: bool,
) -> Tensor:
    """See Sweep. All row blocks at once, one row of each after the other; without coupling all rows at once."""
    if coupling is None or turns is None:
        coupling, turns = state.new_ones(len(state), 1, 1), free.new_zeros(len(state), 1, dtype=torch.int64)
    blocks, width, _ = coupling.shape
    at = torch.arange(blocks, device=state.device)
    moved = torch.zeros_like(state)
    for i in range(state.shape[1]):
        old = rounding.values(places[:, i], i) if descent else torch.zeros_like(state[:, i])
        taken = state.new_zeros(blocks, width)
        for turn in turns.unbind(1):
            rows = at * width + turn
            block = at[rows < len(state)]
            turn, rows = turn[block], rows[block]
            goal = old + state[:, i] - taken.view(-1)[: len(state)]
            place = torch.where(free, rounding.nearest(goal, i), places[:, i])
            value = rounding.values(place, i)
            move = (value - old if descent else goal - value)[rows]
            places[rows, i], moved[rows, i] = place[rows], move
            taken[block] += coupling[block, turn] * move.unsqueeze(1)
        state[:, i + 1 :] -= taken.view(-1)[: len(state), None] * mix[i, i + 1 :]
    return moved


# ---- the loop compiled


def sweep_compiled(
    state: Tensor,
    mix: Tensor,
    rounding: Rounding,
    places: Tensor,
    coupling: Tensor | None,
    turns: Tensor | None,
    free: Tensor,
    descent: bool,
) -> Tensor:
    """See Sweep. Threads share the rows; each takes whole row blocks, so that their number does not change a bit."""
    moved = torch.empty_like(state)
    height = len(state)
    if coupling is None or turns is None:
        coupling, turns = state.new_empty(0, 0, 0), free.new_empty(0, 0, dtype=torch.int64)
    width = coupling.shape[1] or ROWS_TOGETHER
    tensors = [state, mix.contiguous(), places, moved]
    tensors += [rounding.levels.expand(height, -1), rounding.middles.contiguous()]
    tensors += [x.expand(height, -1) for x in (rounding.scale, rounding.zero, rounding.offset)]
    tensors += [rounding.group, coupling.contiguous(), turns.contiguous(), free]
    arrays = [tensor.numpy() for tensor in tensors]
    tile = width * max(1, ROWS_TOGETHER // width)
    _in_threads(-(-height // tile), partial(_compiled(), *arrays, rounding.step, rounding.lowest, descent, width))
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


@cache
def _compiled() -> Callable[..., None]:
    import numba  # takes half a second, which who only loads a model need not wait

    signature = (
        "void(float32[:,:], float32[:,::1], uint8[:,:], float32[:,:], float32[:,:], float32[:,::1], float32[:,:],"
        "float32[:,:], float32[:,:], int64[:], float32[:,:,::1], int64[:,::1], boolean[:], float32, float32, boolean,"
        "int64, int64, int64)"
    )
    # Python's rule, an error for a division by zero, would keep the loops from being vectorized.
    compiler = partial(numba.njit, signature, nogil=True, error_model="numpy", fastmath={"contract"})
    try:
        return compiler(cache=True)(_sweep_rows)
    except RuntimeError:  # nowhere to keep it
        return compiler()(_sweep_rows)


def _sweep_rows(
    state: Array,
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
    descent: bool,
    width: int,
    first: int,
    last: int,
) -> None:
    """Sweep over the tiles first..last of rows, each of some row blocks of `width`. numba compiles this; see Sweep."""
    count, top = len(mix), np.float32(levels.shape[1] - 1)
    none, endless, coupled = np.float32(0), np.float32(np.inf), len(coupling) > 0
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
                old[r] = (own_levels[r, own_places[r, i]] - z[r]) * s[r] + o[r] if descent else none
                goal[r] = old[r] + tile[i, r]
                taken[r] = none
            for base in range(0, size, width):
                end = min(base + width, size)
                near, block = taken[base:end], (start + base) // width
                for turn in range(end - base if coupled else 1):
                    low, high = base, end  # rows that are independent, all at once
                    if coupled:
                        low = base + turns[block, turn]
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
                        move[r] = value - old[r] if descent else goal[r] - value
                        own_moved[r, i] = move[r]
                        taken[r] = taken[r] if coupled else move[r]
                    if coupled and move[low] != 0:
                        along, by = coupling[block, low - base], move[low]
                        for t in range(len(near)):
                            near[t] += along[t] * by
            for j in range(i + 1, count):
                later, by = tile[j], mix[i, j]
                for r in range(size):
                    later[r] -= by * taken[r]
        if not descent:
            for r in range(size):
                for i in range(count):
                    own_state[r, i] = tile[i, r]
