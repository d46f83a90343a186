"""Automatic mixed precision: the recipe that a budget allows, by what each candidate costs each set of matrices.

Costs are taken to add up, and one candidate of every set is chosen by an exact knapsack. Costs that are measured are
measured again with everything at what was chosen first, and the choice is made anew: of the two, the one that is nearer
to the original stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant import estimate, formats, trial
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError
from llmquant.estimate import Row
from llmquant.job import Budget, Prepared, Progress, loading
from llmquant.knapsack import Numbers, solve, undominated
from llmquant.matrices import text_config
from llmquant.plan import Plan
from llmquant.recipe import Recipe
from llmquant.sensitivity import (
    REFERENCE_BYTES,
    Fused,
    Whole,
    estimated,
    in_format,
    measured,
    measured_in_context,
    sizes,
)

TOKENS, LENGTH = 2048, 256  # on which costs are found out, and how many at a time: attention over more is slow
# Operations beyond which measuring every candidate takes longer than about ten minutes, by the kind of device.
AFFORDABLE = {"cpu": 5e13, "cuda": 5e15}
STAGES = 4  # sets of most blocks
ROUNDS = 8  # of looking for the smallest size with a given divergence

Curves = Callable[[], dict[str, Tensor]]


# ---- on paper


def provisional(recipe: Recipe, budget: Budget, model: StreamedModel) -> Recipe:
    """With a candidate in place of the format of the last rule, which is the one that is chosen for: the largest that
    can hold all matrices or, where none can, the smallest, for the plan to say what it cannot hold.
    """
    specs = sorted(budget.formats, key=lambda spec: formats.get(spec).bits_per_weight((4096, 4096)))
    shapes = {
        target.shape
        for block in range(len(model.block_names))
        for target in model.targets(block).values()
        if recipe.rule_for(target.listed) is recipe.rules[-1]
    }
    fitting = [spec for spec in specs if all(_fits(spec, shape) for shape in shapes)]
    return Recipe((*recipe.rules[:-1], replace(recipe.rules[-1], format=[*specs[:1], *fitting][-1])))


def _fits(spec: str, shape: tuple[int, int]) -> bool:
    try:
        formats.get(spec).layout(shape)
    except PlanError:
        return False
    return True


def planned(
    plan: Plan,
    checkpoint: Checkpoint,
    model: StreamedModel,
    recipe: Recipe,
    budget: Budget,
    max_memory: int | None,
    sampled: int,
) -> Plan:
    """The plan made for the provisional recipe, with how formats will be chosen, and what that takes.

    sampled: tokens that the model writes for nothing but this.
    Raises PlanError where the smallest candidates are too large, or memory does not hold what is asked for.
    """
    rows = _free(plan, recipe)
    options = [[own[0] for spec in budget.formats if (own := in_format(checkpoint, (row,), spec))] for row in rows]
    least = sum(min((row.nbytes for row in own), default=0) for own in options)
    _check_limit(plan, rows, budget, least)
    how = _method(model, rows, budget, max_memory)
    seconds, nbytes = plan.seconds, plan.peak_memory
    if sampled:
        seconds += estimate.flop(model.dtype) * 2 * estimate.SLEEP * sampled * sum(row.weights for row in rows)
    if how == "kl":
        seconds += estimate.flop(torch.float32) * operations(model, rows, budget)
        nbytes = max(nbytes, estimate.BASE + memory(model, rows))
    elif model.causal:
        passes = 3 if how == "fisher" else 1
        seconds += estimate.flop(model.dtype) * passes * 2 * TOKENS * sum(row.weights for row in rows)
    if max_memory is not None and nbytes > max_memory:
        raise PlanError(
            f"measuring what formats cost needs about {nbytes:,} bytes of memory, --max-memory gives {max_memory:,}: "
            "take --sensitivity fisher, which needs one block at a time"
        )
    note = f"formats are chosen {aim(budget)} by {how} from {', '.join(budget.formats)}; the table has the largest"
    return replace(plan, seconds=seconds, peak_memory=nbytes, sensitivity=how, notes=(*plan.notes, note))


def aim(budget: Budget) -> str:
    """What is asked for, in words."""
    if budget.bits is not None:
        return f"for {budget.bits:g} bits a weight"
    return f"for {budget.nbytes:,} bytes" if budget.nbytes is not None else f"for a KL divergence of {budget.kl:g}"


def assignments(prepared: Prepared) -> Iterator[list[Row]]:
    """The rows in ways such that every one has every candidate that can hold it once, and formats are mixed."""
    budget, checkpoint = prepared.job.budget, prepared.checkpoint
    free = {row.target.name for row in _free(prepared.plan, prepared.job.recipe)}
    specs = () if budget is None else budget.formats
    for first in range(max(1, len(specs))):
        found = []
        for place, row in enumerate(prepared.plan.rows):
            spec = specs[(first + place) % len(specs)] if row.target.name in free and specs else None
            found.append(next(iter(in_format(checkpoint, (row,), spec) if spec else ()), row))
        yield found


def operations(model: StreamedModel, rows: list[Row], budget: Budget) -> float:
    """Of measuring, for every set and candidate, two of which twice: all blocks from its own on, and the head."""
    head = text_config(model.config).vocab_size * text_config(model.config).hidden_size
    behind = sum(row.weights for row in rows) / 2 + head
    return 2.0 * TOKENS * behind * STAGES * len(model.block_names) * (len(budget.formats) + 2)


def memory(model: StreamedModel, rows: list[Row]) -> int:
    """Bytes that measuring holds: the model in float32, rounded matrices beside it, and what enters its blocks."""
    everything = sum(parameter.numel() for parameter in model.model.parameters())
    states = 2 * (len(model.block_names) + 1) * TOKENS * text_config(model.config).hidden_size
    return 4 * (everything + sum(row.weights for row in rows) + states) + REFERENCE_BYTES


def _free(plan: Plan, recipe: Recipe) -> list[Row]:
    """The rows whose formats are chosen: those of the last rule, in the blocks."""
    return [
        row for row in plan.rows if recipe.rule_for(row.target.listed) is recipe.rules[-1] and row.block is not None
    ]


def _limit(plan: Plan, rows: list[Row], budget: Budget) -> float:
    """Bytes that the free rows may take."""
    fixed = sum(row.nbytes for row in plan.rows) - sum(row.nbytes for row in rows)
    if budget.bits is not None:
        return budget.bits * plan.weights / 8 - fixed
    if budget.nbytes is not None:
        return budget.nbytes - (plan.bytes_after - sum(row.nbytes for row in rows))
    return math.inf


def _check_limit(plan: Plan, rows: list[Row], budget: Budget, least: float) -> None:
    """least: bytes that the free rows take at least."""
    if not rows:
        raise PlanError(f"{aim(budget)}: no matrix is left to choose a format for: all have rules of their own")
    if least > (limit := _limit(plan, rows, budget)):
        fewest = 8 * (sum(row.nbytes for row in plan.rows) - sum(row.nbytes for row in rows) + least) / plan.weights
        raise PlanError(
            f"{aim(budget)}: the matrices take {least:,.0f} bytes at least with {', '.join(budget.formats)}, "
            f"{fewest:.3f} bits a weight, and may take {limit:,.0f}: raise the budget, or give smaller formats"
        )


def _method(model: StreamedModel, rows: list[Row], budget: Budget, max_memory: int | None) -> str:
    """How costs are found out: as asked, or by the sizes of model and machine; not by its speed, which varies."""
    if not model.causal:
        raise PlanError(
            f"{type(model.model).__name__} is no causal language model, and only of those it is known what a format "
            "costs: give one format, or a recipe"
        )
    if budget.kl is not None and budget.sensitivity == "hessian":
        raise PlanError("--max-kl: the errors of outputs say nothing of divergence: take --sensitivity kl or fisher")
    if budget.sensitivity != "auto":
        return budget.sensitivity
    room = int(0.8 * estimate.device_memory(model.device)[1]) if max_memory is None else max_memory - estimate.BASE
    affordable = operations(model, rows, budget) <= AFFORDABLE.get(model.device.type, AFFORDABLE["cpu"])
    return "kl" if affordable and memory(model, rows) <= room else "fisher"


# ---- the choice


@dataclass(frozen=True)
class Found:
    """The candidate of every set, how it came about, and what costs were found."""

    sets: list[Fused]
    picks: tuple[int, ...]
    facts: dict[str, Any]
    costs: list[Numbers]


@torch.no_grad()
def allocate(prepared: Prepared, windows: Tensor, batch: int, curves: Curves, progress: Progress) -> dict[str, Any]:
    """What is chosen: {"recipe": rules, ...}, JSON values.

    windows (n, length) int64: costs are found out on TOKENS of their first LENGTH each; curves: finds G of all targets,
    or nothing where no gradient goes through the blocks. Raises PlanError where the budget cannot be met.
    """
    budget, plan = prepared.job.budget, prepared.plan
    assert budget is not None
    rows = _free(plan, prepared.job.recipe)
    shown = windows[:, :LENGTH]
    shown = shown[: max(1, TOKENS // shown.shape[1])]
    if plan.sensitivity == "kl":
        found = _by_measuring(prepared, budget, rows, shown, batch, progress)
    else:
        found = _by_estimate(prepared, budget, rows, shown, batch, curves, progress)
    nbytes = sizes(found.sets)
    taken = sum(nbytes[place, pick] for place, pick in enumerate(found.picks))
    fixed = sum(row.nbytes for row in plan.rows) - sum(row.nbytes for row in rows)
    chosen = {
        row.target.listed: budget.formats[pick]
        for part, pick in zip(found.sets, found.picks, strict=True)
        for row in part.rows
    }
    last = prepared.job.recipe.rules[-1]
    rules = [replace(last, pattern=name, format=spec) for name, spec in chosen.items()]
    return {
        "recipe": Recipe((*prepared.job.recipe.rules[:-1], *rules)).to_json(),
        "aim": aim(budget),
        "formats": list(budget.formats),
        "bits_per_weight": 8 * (taken + fixed) / plan.weights,
        **({} if budget.kl is not None else {"bits_left": 8 * (_limit(plan, rows, budget) - taken) / plan.weights}),
        "tokens": shown.numel(),
        **found.facts,
        "sets": [
            {
                "names": list(dict.fromkeys(row.target.listed for row in part.rows)),
                "format": budget.formats[pick],
                "costs": [[_json(cost) for cost in costs[place]] for costs in found.costs],
            }
            for place, (part, pick) in enumerate(zip(found.sets, found.picks, strict=True))
        ],
    }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _by_measuring(
    prepared: Prepared, budget: Budget, rows: list[Row], windows: Tensor, batch: int, progress: Progress
) -> Found:
    checkpoint = prepared.checkpoint
    model = StreamedModel(checkpoint, dtype=torch.float32, untied=checkpoint.untied, **loading(prepared.job))
    with Whole(model, windows, batch, progress) as whole:
        sets = whole.sets(checkpoint, rows, budget.formats)

        def divergence(picks: tuple[int, ...]) -> float:
            for part, pick in zip(sets, picks, strict=True):
                whole.put(part.options[pick])
            return whole.divergence()

        search = Search(prepared.plan, rows, budget, sizes(sets), divergence)
        alone = measured(whole, sets, progress)
        chosen, again = searched(whole, sets, search, alone, progress)
        facts = {"predicted_kl": chosen.predicted, "measured_kl": search.divergence(chosen.picks), "gap": chosen.gap}
    return Found(sets, chosen.picks, {"sensitivity": "kl", **facts}, [alone, again])


def searched(
    whole: Whole, sets: list[Fused], search: Search, alone: Numbers, progress: Progress
) -> tuple[Pick, Numbers]:
    """The better of two choices: by the costs of each set alone, and by those in the context of the first choice.

    There the next smaller and the next larger candidate of every set are measured again; of others the difference of
    costs alone is taken. Returns the choice, and the costs in context (sets, candidates).
    """
    first = search.best(alone)
    wanted = np.zeros(alone.shape, dtype=bool)
    for place, pick in enumerate(first.picks):
        steps = list(undominated(search.nbytes[place], alone[place]))
        at = steps.index(pick)
        wanted[place, steps[max(0, at - 1) : at + 2]] = True
    again = measured_in_context(whole, sets, first.picks, wanted, progress)
    own = alone[np.arange(len(sets)), list(first.picks)]
    again = np.where(np.isnan(again), alone - own[:, None], again)
    return search.better(first, search.best(again, search.divergence(first.picks))), again


def _by_estimate(
    prepared: Prepared,
    budget: Budget,
    rows: list[Row],
    windows: Tensor,
    batch: int,
    curves: Curves,
    progress: Progress,
) -> Found:
    model, how = prepared.model, prepared.plan.sensitivity
    found = curves() if how == "fisher" else {}
    if how == "fisher" and not found:
        if budget.sensitivity == "fisher" or budget.kl is not None:
            raise PlanError(
                f"{prepared.job.model}: no gradient goes through its blocks one by one, and without it no "
                "divergence is known: take --sensitivity kl, or hessian for a budget of bits or bytes"
            )
        how = "hessian"
    sets, costs = estimated(
        model, prepared.checkpoint, windows, batch, rows, budget.formats, found if how == "fisher" else None, progress
    )

    def divergence(picks: tuple[int, ...]) -> float:
        chosen = [row for part, pick in zip(sets, picks, strict=True) for row in part.options[pick]]
        return trial.divergence(model, chosen, windows, batch, partial(progress, "measure"))

    search = Search(prepared.plan, rows, budget, sizes(sets), divergence)
    best = search.best(costs)
    facts: dict[str, Any] = {"sensitivity": how, "gap": best.gap}
    if how == "fisher":
        facts["predicted_kl"] = best.predicted
    if budget.kl is not None:
        facts["measured_kl"] = search.divergence(best.picks)
    return Found(sets, best.picks, facts, [costs])


@dataclass(frozen=True)
class Pick:
    """One candidate of every set; predicted: the sum of their costs; gap: how far it may be from the best there is."""

    picks: tuple[int, ...]
    nbytes: float
    predicted: float
    gap: float


class Search:
    """The best allocation within a budget, by costs, and for a divergence by how far the model then really is.

    divergence: of the model with the candidate of every set, nats a token.
    """

    def __init__(
        self,
        plan: Plan,
        rows: list[Row],
        budget: Budget,
        nbytes: Numbers,
        divergence: Callable[[tuple[int, ...]], float],
    ) -> None:
        self._plan, self._rows, self._budget, self.nbytes = plan, rows, budget, nbytes
        self._divergence = divergence
        self._known: dict[tuple[int, ...], float] = {}

    def divergence(self, picks: tuple[int, ...]) -> float:
        if picks not in self._known:
            self._known[picks] = self._divergence(picks)
        return self._known[picks]

    def best(self, costs: Numbers, base: float = 0.0) -> Pick:
        """costs (sets, candidates): of one set alone, on top of `base`. Raises PlanError where nothing is possible."""
        if self._budget.kl is not None:
            return self._smallest(costs, base, self._budget.kl)
        choice = solve(self.nbytes, costs, _limit(self._plan, self._rows, self._budget))
        if choice is None:
            _check_limit(self._plan, self._rows, self._budget, float(self.nbytes.min(1).sum()))
            raise AssertionError("a knapsack without a solution whose smallest choice fits")
        return Pick(choice.picks, choice.cost, base + choice.value, choice.gap)

    def _smallest(self, costs: Numbers, base: float, most: float) -> Pick:
        """Of what a few tries find to be within the divergence `most`, the smallest; costs are corrected in between."""
        allowed = most - base
        best: Pick | None = None
        for _ in range(ROUNDS):
            if (choice := solve(costs, self.nbytes, allowed)) is None:
                break
            found = self.divergence(choice.picks)
            if found <= most and (best is None or choice.value < best.nbytes):
                best = Pick(choice.picks, choice.value, base + choice.cost, choice.gap)
            allowed += most - found
        if best is not None:
            return best
        dearest = tuple(int(undominated(*pair)[-1]) for pair in zip(self.nbytes, costs, strict=True))
        if (found := self.divergence(dearest)) > most:
            raise PlanError(
                f"--max-kl {most:g} cannot be met: with every matrix in the best of {', '.join(self._budget.formats)} "
                f"the divergence is {found:.4g}: give formats with more bits, or a larger divergence"
            )
        places = range(len(dearest))
        return Pick(
            dearest,
            float(self.nbytes[places, dearest].sum()),
            base + float(costs[places, dearest].sum()),
            0.0,
        )

    def better(self, one: Pick, other: Pick) -> Pick:
        if self._budget.kl is not None:
            return one if one.nbytes <= other.nbytes else other
        return one if self.divergence(one.picks) <= self.divergence(other.picks) else other
