"""What is done where numbers go wrong: no run ends for the sake of one matrix, and nothing is passed over in silence.

A matrix is rounded to nearest instead, and that is noted, where
- no calibration token came through it,
- the sums over its inputs are not finite,
- its solver fails in linear algebra, or
- what its solver found is worse than rounding on tokens held out.
Tokens that are not finite are left out of all sums, and a Hessian that is not positive definite is damped until it is:
both are noted. Experts to which no token was sent are calibrated on what the others saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmquant.formats import Format
from llmquant.solvers import CALIBRATED, SOLVERS, Solution, recoveries
from llmquant.stats import Stats, energy


def solve(
    w: Tensor, stats: Stats | None, fmt: Format, name: str, options: dict[str, Any], *, calibrated: bool
) -> tuple[Solution, str, list[str]]:
    """(solution, name of its solver, what was done to get it) for w (out, in) float32.

    calibrated: whether there is calibration at all. Raises what the solver raises, but for failures of linear algebra.
    """
    plain = {key: value for key, value in options.items() if key == "clip"}
    if stats is None:
        unreached = ["no calibration token came through it: rounded to nearest"] if calibrated else []
        if name in CALIBRATED:
            return SOLVERS["rtn"](w, None, fmt, **plain), "rtn", unreached
        return SOLVERS[name](w, None, fmt, **options), name, []
    sums = (stats.hessian, stats.cross, stats.lacking)
    if not all(torch.isfinite(total).all() for total in sums if total is not None):
        solution = SOLVERS["rtn"](w, None, fmt, **plain)
        return solution, "rtn", ["the squares of its inputs add up to infinity: rounded to nearest"]
    with recoveries() as noted:
        try:
            solution = SOLVERS[name](w, stats, fmt, **options)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            noted.append(f"{name} failed ({error}): rounded to nearest")
            solution, name = SOLVERS["rtn"](w, stats, fmt, **plain), "rtn"
        else:
            if (rounding := _better_rounding(w, stats, fmt, solution, name, plain)) is not None:
                noted.append(f"{name} was worse than rounding to nearest on tokens held out: rounded to nearest")
                solution = rounding
    if stats.dropped:
        noted.append(f"{stats.dropped} calibration tokens were NaN or Inf, and were left out")
    if stats.borrowed and not stats.tokens:
        noted.append("no calibration token was sent to it: calibrated on what the other experts saw")
    return solution, name, noted


def _better_rounding(
    w: Tensor, stats: Stats, fmt: Format, solution: Solution, name: str, options: dict[str, Any]
) -> Solution | None:
    """Rounding to nearest, where it is better on held-out tokens than the solution and its rival."""
    held = stats.held
    if held is None or name == "rtn":
        return None
    if any(step.name == "rounding" for step in solution.steps):  # the solver has compared them itself
        kept = [step.name for step in solution.steps if step.kept]
        return solution if kept == ["rounding"] and solution.rival is None else None
    rounding = SOLVERS["rtn"](w, stats, fmt, **options)
    missed = held.missed(w)
    errors = [energy(held.x @ fmt.decode(found.codes, found.grid).sub_(w).T - missed) for found in (solution, rounding)]
    return None if errors[0] <= errors[1] else rounding


def of_run(tensors: list[dict[str, Any]]) -> list[dict[str, str]]:
    """All that was done, of the "tensors" of a manifest: [{"name": matrix, "what": ...}]."""
    return [{"name": tensor["name"], "what": what} for tensor in tensors for what in tensor.get("recoveries", [])]


def coverage(tensors: list[dict[str, Any]]) -> dict[str, int]:
    """How calibration reached experts: matrices, those that no token and too few tokens reached, least and most tokens.

    Nothing where there are no calibrated experts. Too few: fewer than it has inputs.
    """
    tokens = [(tensor["tokens"], tensor["borrowed"]) for tensor in tensors if "expert" in tensor and "tokens" in tensor]
    if not tokens:
        return {}
    counts = sorted(count for count, _ in tokens)
    return {
        "matrices": len(tokens),
        "unreached": counts.count(0),
        "blended": sum(borrowed > 0 for _, borrowed in tokens),
        "least_tokens": counts[0],
        "median_tokens": counts[len(counts) // 2],
        "most_tokens": counts[-1],
    }
