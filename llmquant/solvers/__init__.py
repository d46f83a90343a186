"""Solvers by name. To add one: write a file with a `solve`, and add its name here."""

from __future__ import annotations

from collections.abc import Callable

from llmquant.formats import Format
from llmquant.solvers import adaround, autoround, gptaq, gptq, hqq, refit, rtn
from llmquant.solvers.base import Solution, Solver, Step, default_of, recoveries, wrong_option
from llmquant.solvers.block_tuning import Tuner

__all__ = [
    "CALIBRATED",
    "CROSSED",
    "REFUSALS",
    "SOLVERS",
    "TUNERS",
    "Solution",
    "Solver",
    "Step",
    "Tuner",
    "default_of",
    "recoveries",
    "wrong_option",
]

SOLVERS: dict[str, Solver] = {
    "rtn": rtn.solve,
    "awq": rtn.solve,  # of what scaling.py has scaled before
    "gptq": gptq.solve,
    "gptaq": gptaq.solve,
    "hqq": hqq.solve,
    "kmeans": gptq.solve,  # which is what it is where there are tables
    "adaround": adaround.solve,
}
# Those that tune all matrices of a block together, from where `rtn` leaves them.
TUNERS: dict[str, Tuner] = {"autoround": autoround.tune}
CALIBRATED = {"awq", "gptq", "gptaq", "kmeans", "adaround", *TUNERS}  # those that cannot do without
CROSSED = {"gptaq", "adaround"}  # those that know nothing of a residual stream: they want Stats.cross
# Why a format is none for the solver, if so; solvers that take every format are not named.
REFUSALS: dict[str, Callable[[Format], str | None]] = {"hqq": hqq.refuses, "kmeans": refit.without_tables}
