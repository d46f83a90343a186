"""End-to-end tuning: rounding, scales and norms of all blocks, trained together towards the original's predictions.

What a solver does to one matrix is judged by its outputs, or those of its block. Here the loss is the one that counts,
KL(original || quantized) over calibration tokens, and its gradient reaches

shift    of every code: the level is the one nearest to where it began plus the shift, in mean distances between levels.
         The gradient passes through the rounding as if it were not there (Y. Bengio et al., arXiv:1308.3432); to learn
         rounding that way is SignRound's (W. Cheng et al., arXiv:2309.05516), there block by block.
stretch  the logarithm of a factor of every scale, which is rounded to its stored type before it is used.
delta    of every vector: weights of norms and biases, rounded to the type that the file has.

The file keeps its formats: only values change. The best iterate on held-out tokens is kept, which may be the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from llmquant.blocks import Call, StreamedModel
from llmquant.formats import Format, Grid
from llmquant.formats.base import gaps
from llmquant.matrices import Target

CHUNK_BYTES = 2**26  # of float32 logits that exist at once
WARM_UP = 10  # steps until the rates are reached; from there they fall linearly to nothing
BETAS = (0.9, 0.95)
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
    """Adam's rates, per step: of shifts, of which 0 leaves all codes as they are, of stretches and of deltas."""

    shift: float = 1e-2
    stretch: float = 1e-3
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


def tune(
    model: StreamedModel,
    matrices: list[Matrix],
    vectors: dict[str, torch.dtype],
    windows: Tensor,
    wanted: Tensor,
    held: Tensor,
    *,
    steps: int = 150,
    batch: int = 8,
    seed: int = 0,
    rates: Rates = Rates(),
    recompute: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Train on windows (n, length) int64 where `held` (n,) bool is false, and judge on the others.

    vectors: name in memory -> stored type, of those that are trained. wanted (n, length, hidden): what leaves the last
    block of the original for those windows. The original must be loaded as a whole: every block, and what lies outside.
    recompute: on the way back every block is run again, instead of keeping all that happened in it.
    """
    taught = [_Levels(matrix, model.dtype, shifting=rates.shift > 0) for matrix in matrices]
    moved = {name: _Moved(model.model.get_parameter(name), dtype) for name, dtype in vectors.items()}
    groups = (
        ([part.shift for part in taught if part.shift is not None], rates.shift),
        ([part.stretch for part in taught], rates.stretch),
        ([part.delta for part in moved.values()], rates.delta),
    )
    run = _Run(model, windows, wanted, batch, recompute)
    trained, judged = torch.where(~held)[0], torch.where(held)[0]
    parameters = [parameter for group, _ in groups for parameter in group]
    best, divergences = [parameter.detach().clone() for parameter in parameters], []

    def judge(step: int) -> None:
        divergences.append((step, run.divergence(judged)))
        if divergences[-1][1] <= min(kl for _, kl in divergences):
            for kept, parameter in zip(best, parameters, strict=True):
                kept.copy_(parameter.detach())

    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups if group], betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
    )
    with _in_place(model, taught, moved):
        for step, chosen in enumerate(_batches(trained, batch, steps, seed)):
            if step % JUDGED == 0:
                judge(step)
            run.backward(chosen)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress(step + 1, steps)
        judge(steps)
    with torch.no_grad():
        for kept, parameter in zip(best, parameters, strict=True):
            parameter.copy_(kept)
    return Tuned([part.matrix() for part in taught], {name: part.vector() for name, part in moved.items()}, divergences)


def _batches(indices: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of indices: all of them in random order, and again."""
    generator = torch.Generator().manual_seed(seed)
    left = indices[:0]
    for _ in range(steps):
        while len(left) < min(batch, len(indices)):
            left = torch.cat([left, indices[torch.randperm(len(indices), generator=generator)]])
        yield left[:batch]
        left = left[batch:]


@contextmanager
def _in_place(model: StreamedModel, taught: list[_Levels], moved: dict[str, _Moved]) -> Iterator[None]:
    """The model computes with what is trained instead of its own weights."""
    of_parameter: dict[str, list[_Levels]] = {}
    for levels in taught:
        of_parameter.setdefault(levels.target.parameter, []).append(levels)
    places: list[tuple[nn.Module, str, _Trained]] = []
    for full_name, parts in of_parameter.items():
        trained = parts[0] if parts[0].target.expert is None else _Stack(parts)
        places.append((model.module(parts[0].target), full_name.rpartition(".")[2], trained))
    for full_name, vector in moved.items():
        owner, _, own = full_name.rpartition(".")
        places.append((model.model.get_submodule(owner), own, vector))
    try:
        for module, name, part in places:
            parametrize.register_parametrization(module, name, part, unsafe=True)
        yield
    finally:
        for module, name, _ in places:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


class _Run:
    """The whole model on some of the windows."""

    def __init__(self, model: StreamedModel, windows: Tensor, wanted: Tensor, batch: int, recompute: bool) -> None:
        self.model, self.windows, self.wanted = model, windows, wanted
        self.batch, self.recompute = batch, recompute
        vocabulary = model.config.get_text_config().vocab_size
        self.tokens = max(1, CHUNK_BYTES // (4 * vocabulary))

    def backward(self, chosen: Tensor) -> None:
        """Add the gradient of the mean divergence over the windows chosen."""
        with torch.enable_grad():
            hidden = self._hidden(chosen)
            leaf = hidden.detach().requires_grad_()
            for loss in self._losses(chosen, leaf):
                (loss / self.windows[chosen].numel()).backward()
            hidden.backward(leaf.grad)

    @torch.no_grad()
    def divergence(self, chosen: Tensor) -> float:
        """Mean KL(original || model) per token over the windows chosen."""
        total = 0.0
        for part in chosen.split(self.batch):
            total += sum(float(loss) for loss in self._losses(part, self._hidden(part)))
        return total / self.windows[chosen].numel()

    def _hidden(self, chosen: Tensor) -> Tensor:
        hidden, calls = self.model.embed(self.windows[chosen].to(self.model.device))
        for block, call in enumerate(calls):
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(self._through, block, hidden, call, use_reentrant=False)
            else:
                hidden = self._through(block, hidden, call)
        return hidden

    def _through(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        with parametrize.cached():  # a module may look at its parameter once for every expert
            return self.model.run_block(block, hidden, call)

    def _losses(self, chosen: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """The divergence summed over the tokens of one piece after the other: not all logits exist at once."""
        for index, window in enumerate(chosen.tolist()):
            pieces = (self.windows[window : window + 1], self.wanted[window : window + 1], hidden[index : index + 1])
            for tokens, wanted, found in zip(*(part.split(self.tokens, dim=1) for part in pieces), strict=True):
                with torch.no_grad(), _original(self.model):
                    target = self.model.logits(tokens, wanted.to(found)).float().log_softmax(-1)
                logits = self.model.logits(tokens, found).float().log_softmax(-1)
                yield nn.functional.kl_div(logits, target, reduction="sum", log_target=True)


class _Trained(nn.Module):
    """A parametrization: what a module computes with instead of its own tensor, unless it is `off`."""

    off = False

    def forward(self, original: Tensor) -> Tensor:
        return original if self.off else self.value()

    def value(self) -> Tensor:
        raise NotImplementedError


@contextmanager
def _original(model: StreamedModel) -> Iterator[None]:
    """The model computes with its own tensors."""
    parts = [part for part in model.model.modules() if isinstance(part, _Trained)]
    for part in parts:
        part.off = True
    try:
        yield
    finally:
        for part in parts:
            part.off = False


class _Levels(_Trained):
    """A weight: the levels nearest to where they were plus `shift`, times stretched scales."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype, shifting: bool) -> None:
        super().__init__()
        self.start, self.target, self.dtype = matrix, matrix.target, dtype
        lattice = matrix.format.lattice(matrix.grid)
        self.lattice, self.group = lattice, lattice.group
        places = _places_of(matrix.codes, lattice.codes)
        self.stretch = nn.Parameter(torch.zeros_like(matrix.grid.scale))
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

    def value(self) -> Tensor:
        with torch.no_grad():
            places, scale = self.places(), self.scale()
        w = _Decode.apply(self.shift, self.stretch, places, scale, self)
        if self.lattice.offset is not None:
            w = w + self.wide(self.lattice.offset)
        return self.target.stored(w.to(self.dtype))

    def wide(self, values: Tensor) -> Tensor:
        """(out or 1, groups) -> (out or 1, in)"""
        return values.repeat_interleave(self.group, dim=1)[:, : self.target.shape[1]]

    @torch.no_grad()
    def matrix(self) -> Matrix:
        """As it is now."""
        grid = replace(self.start.grid, scale=self.scale())
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


class _Stack(_Trained):
    """The experts of one parameter."""

    def __init__(self, parts: list[_Levels]) -> None:
        super().__init__()
        self.experts = parts

    def value(self) -> Tensor:
        return torch.stack([expert.value() for expert in self.experts])


class _Moved(_Trained):
    """A vector: what it was plus `delta`, rounded to the type of the file."""

    def __init__(self, original: Tensor, stored: torch.dtype) -> None:
        super().__init__()
        self.start, self.dtype, self.stored_dtype = original.detach().float(), original.dtype, stored
        self.delta = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        moved = self.start + self.delta
        return (moved + (moved.to(self.stored_dtype).float() - moved).detach()).to(self.dtype)

    @torch.no_grad()
    def vector(self) -> Tensor:
        """As the file will hold it."""
        return (self.start + self.delta).to(self.stored_dtype)
