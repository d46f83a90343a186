"""End-to-end tuning: rounding, scales and norms of all blocks, trained together towards the original's predictions.

What a solver does to one matrix is judged by its outputs, or those of its block. Here the loss is the one that counts,
KL(original || quantized) over calibration tokens, and its gradient reaches

shift    of every code: the level is the one nearest to where it began plus the shift, in mean distances between levels.
         The gradient passes through the rounding as if it were not there (Y. Bengio et al., arXiv:1308.3432); to learn
         rounding that way is SignRound's (W. Cheng et al., arXiv:2309.05516), there block by block.
stretch  the logarithm of a factor of every scale, which is rounded to its stored type before it is used.
drift    of every zero point that is a real number, in steps. One that is an integer code stays: a move by one would
         move all of its group by a whole step.
delta    of every vector: weights of norms and biases, rounded to the type that the file has.

The file keeps its formats: only values change. The best iterate on held-out tokens is kept, which may be the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.blocks import StreamedModel
from llmquant.formats import Format, Grid
from llmquant.formats.base import gaps
from llmquant.matrices import Target
from llmquant.teacher import CHUNK_BYTES, Pupil, Teacher
from llmquant.trained import Moved, Training, Weight, batches, in_place

JUDGED = 25  # steps from one look at the held-out tokens to the next


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix (out, in). lean (out, in): see solvers.Solution."""

    target: Target
    format: Format
    codes: Tensor
    grid: Grid
    lean: Tensor | None = None


@dataclass(frozen=True)
class Rates:
    """Adam's rates, per step: of shifts, of which 0 leaves all codes as they are, of stretches, drifts and deltas."""

    shift: float = 1e-2
    stretch: float = 1e-3
    drift: float = 1e-3
    delta: float = 1e-3


@dataclass(frozen=True)
class Means:
    """How a model is trained with the memory there is, and the bytes that it takes."""

    shifts: bool
    recompute: bool
    nbytes: int

    @classmethod
    def within(cls, room: int, *, weights: int, features: int, blocks: int, tokens: int, itemsize: int) -> Means:
        """The best of what fits into `room` bytes, or what takes the least.

        weights: of all matrices; features: the sum of their rows and columns; tokens: of one batch; itemsize: of a
        weight in memory.
        """
        ways = []
        for shifts in (True, False):  # center, shift, its gradient, two moments of Adam, the best: float32; the place
            for recompute in (False, True):
                kept = (weights + 2 * features * tokens) * itemsize  # decoded weights, and what enters and leaves them
                own = weights * (itemsize + (6 * 4 + 1 if shifts else 1))
                ways.append(cls(shifts, recompute, own + (2 * kept // blocks if recompute else kept) + 4 * CHUNK_BYTES))
        return next((way for way in ways if way.nbytes <= room), ways[-1])


@dataclass(frozen=True)
class Tuned:
    """What came of it: the KL divergence on held-out tokens, in nats, at every look; the least is kept."""

    matrices: list[Matrix]
    vectors: dict[str, Tensor]  # by name in memory, as the file will hold them
    divergences: list[tuple[int, float]]  # (step, KL)

    @property
    def kept(self) -> bool:
        """Whether tuning found anything better than where it began."""
        return min(kl for _, kl in self.divergences) < self.divergences[0][1]


Look = Callable[[dict[str, Tensor]], None]
"""Is handed the state of training at every look at the held-out tokens, for it to be taken up from there."""


def tune(
    model: StreamedModel,
    matrices: list[Matrix],
    vectors: dict[str, torch.dtype],
    windows: Tensor,
    teacher: Teacher,
    held: Tensor,
    *,
    steps: int = 150,
    batch: int = 8,
    seed: int = 0,
    rates: Rates = Rates(),
    recompute: bool = False,
    begun: dict[str, Tensor] | None = None,
    look: Look = lambda state: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Train on windows (n, length) int64 where `held` (n,) bool is false, and judge on the others.

    vectors: name in memory -> stored type, of those that are trained. teacher: what the original predicts for those
    windows. The model must be loaded as a whole: what lies outside, and of every block what is not among the matrices.
    recompute: on the way back every block is run again, instead of keeping all that happened in it. begun: what `look`
    was handed by a run that was cut.
    """
    taught = [_Levels(matrix, model.dtype, shifting=rates.shift > 0) for matrix in matrices]
    moved = {name: Moved(model.model.get_parameter(name), dtype) for name, dtype in vectors.items()}
    training = Training(
        (
            ([part.shift for part in taught if part.shift is not None], rates.shift),
            ([part.stretch for part in taught], rates.stretch),
            ([part.drift for part in taught if part.drift is not None], rates.drift),
            ([part.delta for part in moved.values()], rates.delta),
        ),
        steps,
    )
    pupil = Pupil(model, windows, teacher, batch, recompute=recompute)
    trained, judged = torch.where(~held)[0], torch.where(held)[0]
    first = 0 if begun is None else training.restore(begun)
    with in_place(model.model, taught, moved):
        for step, chosen in enumerate(batches(trained, batch, steps, seed)):
            if step < first:
                continue
            if step % JUDGED == 0 and (step > first or begun is None):
                training.judge(step, pupil.divergence(judged))
                look(training.tensors(step))
            training.pace(step)
            with torch.enable_grad():
                pupil(chosen).backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
            progress(step + 1, steps)
        training.judge(steps, pupil.divergence(judged))
    training.take_best()
    tuned = {name: part.vector() for name, part in moved.items()}
    return Tuned([part.matrix() for part in taught], tuned, training.divergences)


class _Levels(Weight):
    """A weight: the levels nearest to where they were plus `shift`, times stretched scales."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, shifting: bool) -> None:
        super().__init__()
        self.start, self.target, self.dtype = matrix, matrix.target, dtype
        lattice = matrix.format.lattice(matrix.grid)
        self.lattice, self.group = lattice, lattice.group
        places = _places_of(matrix.codes, lattice.codes)
        self.stretch = nn.Parameter(torch.zeros_like(matrix.grid.scale))
        self.drift = None if lattice.offset is None else nn.Parameter(torch.zeros_like(matrix.grid.scale))
        self.shift: nn.Parameter | None = None
        if not shifting:
            self.fixed = places.to(torch.uint8)
            return
        self.unit = gaps(lattice.levels)
        self.middles = ((lattice.levels[:, 1:] + lattice.levels[:, :-1]) / 2).contiguous()
        self.center = lattice.levels.expand(len(places), -1).gather(1, places)
        if matrix.lean is not None:
            self.center += self._within(matrix.lean.float() * self.unit, places)
        self.shift = nn.Parameter(torch.zeros_like(self.center))

    def _within(self, lean: Tensor, places: Tensor) -> Tensor:
        """As much of the lean as leaves the level the nearest."""
        levels = self.lattice.levels
        half = (levels[:, 1:] - levels[:, :-1]) * (0.5 - 1e-3)
        above, below = torch.cat([half, half[:, -1:]], 1), torch.cat([half[:, :1], half], 1)
        above, below = (side.expand(len(lean), -1).gather(1, places) for side in (above, below))
        return torch.minimum(torch.maximum(lean, -below), above)

    def places(self) -> Tensor:
        """Which levels are nearest (out, in) uint8."""
        if self.shift is None:
            return self.fixed
        wanted = self.center + self.shift * self.unit
        if len(self.middles) == 1:
            return torch.bucketize(wanted, self.middles[0], out_int32=True).to(torch.uint8)
        return torch.searchsorted(self.middles, wanted, out_int32=True).to(torch.uint8)

    def steps(self, places: Tensor) -> Tensor:
        """What the scale multiplies (out, in)."""
        steps = self.lattice.levels.expand(len(places), -1).gather(1, places.long())
        return steps if self.lattice.zero is None else steps.sub_(self.wide(self.lattice.zero))

    def scale(self) -> Tensor:
        """The stretched scales as the file will hold them."""
        grid, fmt = self.start.grid, self.start.format
        wanted = grid.scale * self.stretch.exp()
        return torch.stack([fmt.storable(wanted[:, g], grid, g) for g in range(wanted.shape[1])], dim=1)

    def offset(self) -> Tensor | None:
        """What is added to all, moved by `drift`, as the file will hold it; the rounding has no slope of its own."""
        if self.drift is None or self.start.grid.zero is None:
            return None
        wanted = self.start.grid.zero + self.drift * self.lattice.scale.abs()
        stored = self.start.format.moved(self.start.grid, zero=wanted.detach()).zero
        return stored if stored is None else wanted + (stored - wanted).detach()

    def value(self, original: Tensor) -> Tensor:
        with torch.no_grad():
            places, scale = self.places(), self.scale()
        w = _Decode.apply(self.shift, self.stretch, places, scale, self)
        if (offset := self.offset()) is not None:
            w = w + self.wide(offset)
        return self.target.stored(w.to(self.dtype))

    def wide(self, values: Tensor) -> Tensor:
        """(out or 1, groups) -> (out or 1, in)"""
        return values.repeat_interleave(self.group, dim=1)[:, : self.target.shape[1]]

    @torch.no_grad()
    def matrix(self) -> Matrix:
        """As it is now."""
        grid = replace(self.start.grid, scale=self.scale())
        if (offset := self.offset()) is not None:
            grid = replace(grid, zero=offset)
        return replace(self.start, codes=self.lattice.codes[self.places().int()], grid=grid)


def _places_of(codes: Tensor, known: Tensor) -> Tensor:
    """Where each of codes (out, in) is among those known (K,)."""
    ascending, places = known.long().sort()
    return places[torch.searchsorted(ascending, codes.long())]


class _Decode(torch.autograd.Function):
    """Levels times scales, as if levels were shift * unit plus a constant, and scales exp(stretch) times one.

    Kept for the way back are a byte for every weight, and the scales.
    """

    @staticmethod
    def forward(
        ctx: Any, shift: Tensor | None, stretch: Tensor, places: Tensor, scale: Tensor, part: _Levels
    ) -> Tensor:
        ctx.save_for_backward(places, scale)
        ctx.part = part
        return part.steps(places).mul_(part.wide(scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (places, scale), part, (gradient,) = ctx.saved_tensors, ctx.part, gradients
        columns, groups = places.shape[1], scale.shape[1]
        of_scale = nn.functional.pad(part.steps(places).mul_(gradient), (0, groups * part.group - columns))
        of_scale = of_scale.unflatten(1, (groups, part.group)).sum(-1) * scale
        if len(scale) == 1:
            of_scale = of_scale.sum(0, keepdim=True)
        of_shift = gradient * part.wide(scale) * part.unit if ctx.needs_input_grad[0] else None
        return of_shift, of_scale, None, None, None
