"""Solvers by name. To add one: write a file with a `solve`, and add its name here."""

from __future__ import annotations

from llmquant.solvers import gptq, rtn
from llmquant.solvers.base import Solution, Solver, Step

__all__ = ["CALIBRATED", "SOLVERS", "Solution", "Solver", "Step"]

SOLVERS: dict[str, Solver] = {"rtn": rtn.solve, "gptq": gptq.solve}
CALIBRATED = {"gptq"}  # those that cannot do without
