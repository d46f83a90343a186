"""Solvers by name. To add one: write a file with a `solve`, and add its name here."""

from __future__ import annotations

from llmquant.solvers import rtn
from llmquant.solvers.base import Solution, Solver

__all__ = ["SOLVERS", "Solution", "Solver"]

SOLVERS: dict[str, Solver] = {"rtn": rtn.solve}
