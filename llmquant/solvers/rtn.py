"""Round to nearest on the best grid: each weight by itself, each group's range searched.

With calibration an error counts as much as the mean square of the input it is multiplied with, the diagonal of the
Hessian; without, all errors count alike.
"""

from __future__ import annotations

from torch import Tensor

from llmquant.formats import Format
from llmquant.solvers.base import Solution
from llmquant.stats import Stats, energy


def solve(w: Tensor, stats: Stats | None, fmt: Format, *, clip: str = "search") -> Solution:
    """w (out, in) float32. clip: the format's named rule for the range. Raises what Format.fit raises."""
    codes, grid = fmt.quantize(w, None if stats is None else stats.importance(), clip=clip)
    error = fmt.decode(codes, grid).sub_(w)
    return Solution(codes, grid, energy(error) if stats is None else stats.output_energy(error))
