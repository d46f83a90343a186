"""The contract of a solver: solve(w, stats, fmt, **options) -> Solution. Options are keyword-only and documented."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

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
    # (out, in) float16: how far from its level each weight would best be, in mean distances between levels; if asked.
    lean: Tensor | None = None


# solve(w, stats, fmt, **options): w (out, in) float32; stats of the inputs it saw, or None without calibration.
Solver = Callable[..., Solution]


_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


@contextmanager
def recoveries() -> Iterator[list[str]]:
    """Collects what solvers note while it is entered."""
    found: list[str] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note_recovery(what: str) -> None:
    """For the report: numbers went wrong, and `what` was done about it."""
    noted = _noted.get()
    if noted is not None and what not in noted:
        noted.append(what)


def wrong_option(solver: Callable[..., Any], options: dict[str, Any]) -> str | None:
    """What is wrong with the options for a solver, if anything is: all are keyword-only and have a default."""
    known = _defaults(solver)
    for name, value in options.items():
        if name not in known:
            return f"has no option {name!r}: known are {', '.join(known)}"
        wanted = type(known[name])
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            return f"takes a {wanted.__name__} as {name}, not {value!r}"
        if wanted in (int, float) and not 0 <= value < math.inf:
            return f"takes a finite {name} of at least 0, not {value!r}"
    return None


def default_of(solver: Callable[..., Any], option: str) -> Any:
    return _defaults(solver)[option]


def _defaults(solver: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(solver).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
