"""Solvers by name. To add one: write a file with a `solve`, and add its name here."""

from __future__ import annotations

from collections.abc import Callable

from llmquant.formats import Format
from llmquant.solvers import gptaq, gptq, hqq, kmeans, rtn
from llmquant.solvers.base import Solution, Solver, Step, wrong_option

__all__ = ["CALIBRATED", "REFUSALS", "SOLVERS", "Solution", "Solver", "Step", "wrong_option"]

SOLVERS: dict[str, Solver] = {
    "rtn": rtn.solve,
    "awq": rtn.solve,  # of what scaling.py has scaled before
    "gptq": gptq.solve,
    "gptaq": gptaq.solve,
    "hqq": hqq.solve,
    "kmeans": kmeans.solve,
}
CALIBRATED = {"awq", "gptq", "gptaq", "kmeans"}  # those that cannot do without
# Why a format is none for the solver, if so; solvers that take every format are not named.
REFUSALS: dict[str, Callable[[Format], str | None]] = {"hqq": hqq.refuses, "kmeans": kmeans.refuses}
