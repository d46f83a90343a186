"""Where the time of a run goes: seconds of the clock by what was done, each counted once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REST = "rest"
# The model's products and the solvers': what a run is for. All else is what it takes to get there.
ARITHMETIC = ("sample", "choose", "forward", "curvature", "statistics", "solve", "tune")


class Clock:
    """Seconds by phase. A phase that is entered within another one takes its time from it, if that is not whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.whole = False
        self._phase, self._since = REST, time.perf_counter()

    def switch(self, phase: str) -> str:
        """From now on time is that of `phase`. Returns the phase before."""
        before, now = self._phase, time.perf_counter()
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return before


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Gives {phase: seconds} of what runs meanwhile in this thread, complete at the end; REST is all without a name."""
    clock = Clock()
    token = _clock.set(clock)
    try:
        yield clock.seconds
    finally:
        clock.switch(REST)
        _clock.reset(token)


@contextmanager
def phase(name: str, *, whole: bool = False) -> Iterator[None]:
    """What runs meanwhile is counted as `name`, where anybody counts; usable as a decorator, too.

    whole: phases entered meanwhile are counted as this one.
    """
    clock = _clock.get()
    if clock is None or clock.whole:
        yield
        return
    before, clock.whole = clock.switch(name), whole
    try:
        yield
    finally:
        clock.whole = False
        clock.switch(before)


def overhead(seconds: dict[str, float]) -> float:
    """The share of a run that is not ARITHMETIC."""
    total = sum(seconds.values())
    return 1 - sum(seconds.get(name, 0.0) for name in ARITHMETIC) / total if total else 0.0
