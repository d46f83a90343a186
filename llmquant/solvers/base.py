"""The contract of a solver: solve(w, stats, fmt, **options) -> Solution. Options are keyword-only and documented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llmquant.formats import Grid


@dataclass(frozen=True)
class Step:
    """One step of a solver: what it left of the error on tokens held out, and whether its result was kept."""

    name: str
    error: float  # relative to the outputs of the unquantized weight, root mean square
    kept: bool


@dataclass(frozen=True)
class Solution:
    """What a solver found for one weight."""

    codes: Tensor  # (out, in)
    grid: Grid
    loss: float  # tr((W - Q) H (W - Q)^T) / tokens where calibrated, else |W - Q|^2
    steps: tuple[Step, ...] = ()
    # One that gives up some of the output error for what the loss feels less of: only the whole block can judge it.
    rival: Solution | None = None


# solve(w, stats, fmt, **options): w (out, in) float32; stats of the inputs it saw, or None without calibration.
Solver = Callable[..., Solution]
