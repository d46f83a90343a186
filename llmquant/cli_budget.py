"""A budget on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant.cli_common import bytes_named
from llmquant.errors import PlanError

if TYPE_CHECKING:  # torch comes with it
    from llmquant.job import Budget


def budget_of(
    bits: float | None, size: str | None, kl: float | None, formats: str | None, sensitivity: str
) -> Budget | None:
    """None where none is given. Raises PlanError."""
    from llmquant.job import FORMATS, Budget

    nbytes = bytes_named(size, "--target-size")
    if bits is None and nbytes is None and kl is None:
        if formats is not None or sensitivity != "auto":
            raise PlanError("--formats and --sensitivity go with --target-bpw, --target-size or --max-kl: give one")
        return None
    candidates = FORMATS if formats is None else tuple(spec.strip() for spec in formats.split(","))
    return Budget(bits, nbytes, kl, candidates, sensitivity)


def short(budget: Budget) -> str:
    """For the name of a folder."""
    if budget.bits is not None:
        return f"{budget.bits:g}bpw"
    return f"{budget.nbytes}bytes" if budget.nbytes is not None else f"kl{budget.kl:g}"
