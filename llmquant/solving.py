"""One block: its matrices solved stage by stage, each judged, and put in place for those that follow."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import recovery
from llmquant.calibration import Streams
from llmquant.errors import (
    LlmquantError,
)
from llmquant.estimate import Row
from llmquant.job import Prepared
from llmquant.matrices import Target
from llmquant.phases import phase
from llmquant.ranks import Parcel
from llmquant.scaling import Scales, awq, balance
from llmquant.solvers import CROSSED, TUNERS, Solution, default_of
from llmquant.solvers.block_tuning import Part
from llmquant.stages import Stage
from llmquant.stats import Stats, energy, ratio
from llmquant.swap import WeightSwap


@dataclass(frozen=True)
class Result:
    """What came of one matrix, and the figures that are noted of it."""

    row: Row
    solution: Solution
    report: dict[str, Any]
    rival: Result | None = None


def solve_block(
    prepared: Prepared,
    block: int,
    streams: Streams | None,
    curves: dict[str, Tensor],
    swap: WeightSwap,
    scales: Scales | None,
    step: Callable[[int], None],
) -> list[Result]:
    """Stage by stage in the order of the forward pass, so that each sees the inputs its quantized predecessors give.

    The matrices of a stage are shared out over the processes, and all get all results.
    """
    rows = {row.target.name: row for row in prepared.plan.of_block(block)}
    order = [] if streams is None else streams.stages(block)
    if streams is not None:
        streams.remember(block, order)
    reached = {target.name for stage in order for target in stage.targets}
    if rest := [row.target for name, row in rows.items() if name not in reached]:
        order.append(Stage(rest))
    results: dict[str, Result] = {}
    for stage in order:
        wanted = [rows[target.name] for target in stage.targets if target.name in rows]
        if not wanted:
            continue
        stage.crossed = any(row.rule.solver in CROSSED for row in wanted)
        mine = _mine(prepared, wanted)
        seen: Iterable[tuple[Target, Stats | None]] = ((row.target, None) for row in mine.values())
        if scales is not None and stage.targets[0].name in reached and any(_needs_stats(row) for row in wanted):
            seen = _scaled(scales, rows, stage, mine)
        for result in _own(prepared, mine, seen, scales, curves, swap):
            results[result.row.target.name] = result
            if streams is not None:
                put(prepared, swap, result.row, result.solution)
            step(sum(result.row.weights for result in results.values()))
        for result in _of_others(prepared, wanted, [results[name] for name in mine]):
            results[result.row.target.name] = result
            if streams is not None:
                put(prepared, swap, result.row, result.solution)
        step(sum(result.row.weights for result in results.values()))
        if streams is not None:
            solved = [results[row.target.name] for row in wanted]
            for result in _judged(prepared, block, streams, curves, swap, solved):
                results[result.row.target.name] = result
            streams.finish(block, _finished(prepared, block, results))
    if streams is not None:
        results |= _block_tuned(prepared, block, streams, curves, swap, results)
    return [results[name] for name in rows]


def _finished(prepared: Prepared, block: int, results: Container[str]) -> list[nn.Module]:
    """The parts of a block all of whose matrices have their results, apart from those that are tuned together later."""
    rows = prepared.plan.of_block(block)
    found = []
    for name, part in prepared.model.parts(block):
        own = [row for row in rows if row.target.parameter.startswith(f"{name}.")]
        if own and all(row.target.name in results and row.rule.solver not in TUNERS for row in own):
            found.append(part)
    return found


def _own(
    prepared: Prepared,
    mine: dict[str, Row],
    seen: Iterable[tuple[Target, Stats | None]],
    scales: Scales | None,
    curves: dict[str, Tensor],
    swap: WeightSwap,
) -> Iterator[Result]:
    """The matrices of a stage that this process solves."""
    for number, (target, stats) in enumerate(seen, 1):
        row = mine[target.name]
        if scales is None or stats is None:
            yield _solve(row, row.target.matrix(prepared.model.module(row.target)).detach(), None)
            continue
        stats.curvature = scales.curvature(target.name, curves.get(target.name))
        stats.last = number == len(mine)
        weight = scales.matrix(target.name)
        with swap.resting():
            result = _solve(row, weight, stats)
            if stats.last:
                stats.clear()  # before the block needs the room again
        yield result


def _needs_stats(row: Row) -> bool:
    return row.rule.solver not in TUNERS


def _mine(prepared: Prepared, rows: list[Row]) -> dict[str, Row]:
    """Those of some matrices that this process solves, by name."""
    ranks = prepared.ranks
    owners = ranks.shares([row.weights for row in rows])
    return {row.target.name: row for row, owner in zip(rows, owners, strict=True) if owner == ranks.rank}


def _of_others(prepared: Prepared, rows: list[Row], mine: list[Result]) -> Iterator[Result]:
    """What the other processes found for their share of the matrices, once all are done."""
    if prepared.ranks.count == 1:
        return
    of_name = {row.target.name: row for row in rows}
    for number, parcel in enumerate(prepared.ranks.each(_told(mine))):
        if number != prepared.ranks.rank:
            yield from _heard(parcel, of_name, prepared.model.device)


def _told(results: list[Result]) -> Parcel:
    """Results as they are sent: codes and grids as a file would hold them."""
    tensors: dict[str, Tensor] = {}
    facts = []
    for result in results:
        for kind, each in (("", result), ("rival ", result.rival)):
            if each is None:
                continue
            name, found = f"{kind}{result.row.target.name}", each.solution
            packed = each.row.format.pack(found.codes, found.grid)
            tensors |= {f"{name} {suffix}": tensor for suffix, tensor in packed.items()}
            if found.lean is not None:
                tensors[f"{name} lean"] = found.lean
            facts.append((kind, result.row.target.name, found.loss, each.report))
    return Parcel(facts, tensors)


def _heard(parcel: Parcel, rows: dict[str, Row], device: torch.device) -> Iterator[Result]:
    """The results that were sent."""
    found: dict[tuple[str, str], Result] = {}
    for kind, target, loss, report in parcel.facts:
        row, name = rows[target], f"{kind}{target}"
        named = {suffix: parcel.tensors[f"{name} {suffix}"] for suffix in row.format.layout(row.target.shape)}
        codes, grid = row.format.unpack(named, row.target.shape)
        solution = Solution(codes.to(device), grid.to(device), loss, lean=parcel.tensors.get(f"{name} lean"))
        found[kind, target] = Result(row, solution, report)
    for (kind, target), result in found.items():
        if not kind:
            yield replace(result, rival=found.get(("rival ", target)))


def _scaled(scales: Scales, rows: dict[str, Row], stage: Stage, mine: Container[str]) -> Iterable[tuple[Target, Stats]]:
    """Move scales where the solver wants it, into the columns of a stage or from its rows.

    Returns the targets of the stage that are in `mine` with the statistics of what they read then.
    """
    names = [target.name for target in stage.targets]
    places = []
    for place in scales.places:
        parts = [*place.readers, *([] if place.offset is not None else [place.source])]
        solvers = {rows[name].rule.solver if name in rows else None for name in parts}
        if len(solvers) == 1:  # all are quantized, and in one way
            places.append((place, solvers.pop()))
    formats = {name: row.format for name, row in rows.items()}
    for place, solver in places:
        after_norm = place.offset is not None and names == list(place.readers)
        if solver == "awq" and (after_norm or place.source in names):
            awq(scales, place, formats)
    stage.scale = scales.columns.get(names[0])
    balanced = [
        place
        for place, solver in places
        if solver == "gptq" and place.offset is not None and names == list(place.readers)
    ]
    if not balanced:
        return scales.streams.statistics(scales.block, stage, scales.swap, mine)
    stats = next(scales.streams.statistics(scales.block, stage, scales.swap))[1]  # which all targets share
    for place in balanced:
        stats = balance(scales, place, stats, formats)
    return ((target, stats) for target in stage.targets if target.name in mine)


def _judged(
    prepared: Prepared,
    block: int,
    streams: Streams,
    curves: dict[str, Tensor],
    swap: WeightSwap,
    results: list[Result],
) -> Iterator[Result]:
    """Each result whose rival brings the block's outputs nearer to the reference on held-out tokens, with the rival."""
    if streams.summed == len(streams.batches) or not any(result.rival for result in results):
        return
    metric = curves.get(prepared.model.block_names[block])
    least = streams.block_error(block, swap, metric)
    for group in _groups(results):
        rivals = [result.rival for result in group if result.rival is not None]
        if not rivals:
            continue
        for rival in rivals:
            put(prepared, swap, rival.row, rival.solution)
        error = streams.block_error(block, swap, metric)
        noted = {"name": "two-sided", "error": error, "before": least, "kept": error < least}
        for result in group:
            chosen = result.rival if error < least and result.rival is not None else result
            put(prepared, swap, chosen.row, chosen.solution)
            steps = [*result.report["steps"], *([] if result.rival is None else [noted])]
            yield Result(chosen.row, chosen.solution, {**chosen.report, "steps": steps})
        least = min(error, least)


def _groups(results: list[Result]) -> Iterator[list[Result]]:
    """What is judged at once: each matrix by itself, all experts of a parameter together."""
    for _, group in groupby(results, key=lambda result: result.row.target.listed):
        yield list(group)


def _block_tuned(
    prepared: Prepared,
    block: int,
    streams: Streams,
    curves: dict[str, Tensor],
    swap: WeightSwap,
    results: dict[str, Result],
) -> dict[str, Result]:
    """The results of matrices that are tuned together, kept where held-out tokens agree; with each rule by itself."""
    rules = list(dict.fromkeys(id(result.row.rule) for result in results.values() if not _needs_stats(result.row)))
    found: dict[str, Result] = {}
    metric = curves.get(prepared.model.block_names[block])
    for rule in rules:
        mine = {name: result for name, result in results.items() if id(result.row.rule) == rule}
        before = streams.block_error(block, swap, metric) if streams.summed < len(streams.batches) else None
        solutions = _tune_block(prepared, block, streams, swap, mine)
        for name, solution in solutions.items():
            put(prepared, swap, mine[name].row, solution)
        after = None if before is None else streams.block_error(block, swap, metric)
        kept = before is None or after is None or after < before
        step = {"name": "tuning", "error": after, "before": before, "kept": kept}
        for name, result in mine.items():
            w = _original(swap, result.row)
            solution = solutions[name] if kept else result.solution
            loss = energy(result.row.format.decode(solution.codes, solution.grid).sub_(w))  # not that of its outputs
            solution = replace(solution, loss=loss)
            put(prepared, swap, result.row, solution)
            report = {
                **report_of(result.row, w, solution, None, None),
                "solver": result.row.rule.solver,
                "steps": [step],
            }
            found[name] = Result(result.row, solution, report)
    return found


def _original(swap: WeightSwap, row: Row) -> Tensor:
    """The weight (out, in) float32 as it was before anything took its place."""
    return row.target.seen(swap.pairs[row.target.parameter][1]).float()


@phase("solve")
def _tune_block(
    prepared: Prepared, block: int, streams: Streams, swap: WeightSwap, results: dict[str, Result]
) -> dict[str, Solution]:
    """Matrices of one rule, from the grids of `results`, by the gradients of what the block puts out."""
    rows = {name: result.row for name, result in results.items()}
    parts = {name: Part(_original(swap, row), row.format, results[name].solution.grid) for name, row in rows.items()}
    wanted = streams.outputs(block, swap)

    def gradient(batch: int, weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        for name, weight in weights.items():
            with phase("put"):
                swap.put(prepared.model, rows[name].target, weight)
        turn, process = divmod(batch, streams.ranks.count)
        own = Parcel()
        if process == streams.ranks.rank:
            own = Parcel(*streams.gradient(block, turn, wanted[turn], [row.target for row in rows.values()]))
        found = streams.ranks.sent(process, own)
        return found.facts, found.tensors

    rule = next(iter(rows.values())).rule
    seed = prepared.job.seed * len(prepared.model.block_names) + block
    return TUNERS[rule.solver](parts, gradient, streams.summed, seed, **rule.options)


def solve_outside(prepared: Prepared, streams: Streams | None) -> list[Result]:
    """What rules name outside the blocks: on what leaves the last of them, or from the weights alone."""
    rows, model = prepared.plan.of_block(None), prepared.model
    if not rows:
        return []
    results: dict[str, Result] = {}
    mine = _mine(prepared, rows)
    with model.loaded(None):
        for row in rows:
            calibrated = streams is not None and isinstance(model.module(row.target), nn.Linear)
            stats = streams.behind_blocks(row.target) if streams is not None and calibrated else None
            if row.target.name in mine:
                results[row.target.name] = _solve(row, row.target.matrix(model.module(row.target)).detach(), stats)
    others = _of_others(prepared, rows, [*results.values()])
    results |= {result.row.target.name: result for result in others}
    return [results[row.target.name] for row in rows]


@phase("solve")
def _solve(row: Row, weight: Tensor, stats: Stats | None) -> Result:
    """weight (out, in) in the model's type."""
    w = weight.float()
    name, options = row.rule.solver, row.rule.options
    if name in TUNERS:  # where tuning starts
        name, options = "rtn", {"clip": options.get("clip", default_of(TUNERS[name], "clip"))}
    try:
        solution, name, noted = recovery.solve(w, stats, row.format, name, options, calibrated=row.block is not None)
    except LlmquantError as error:
        raise type(error)(f"{row.key if row.target.expert is None else row.target.name}: {error}") from None
    outputs = None if stats is None else stats.output_energy(w)  # as dear as a step of the solver, and wanted twice
    facts = {"solver": name, **({"recoveries": noted} if noted else {})}
    rival = None
    if solution.rival is not None:
        rival = Result(row, solution.rival, {**report_of(row, w, solution.rival, stats, outputs), **facts})
    return Result(row, solution, {**report_of(row, w, solution, stats, outputs), **facts}, rival)


def report_of(row: Row, w: Tensor, solution: Solution, stats: Stats | None, outputs: float | None) -> dict[str, Any]:
    """Relative errors: of the weight and, where calibrated, of its outputs, whose energy is `outputs`."""
    report: dict[str, Any] = {
        "name": row.target.name,
        "key": row.key,
        "format": row.format.spec,
        "shape": list(row.target.shape),
        "bits_per_weight": row.format.bits_per_weight(row.target.shape),
        "loss": solution.loss,
    }
    if row.target.expert is not None:
        report["expert"] = row.target.expert
    if stats is None or outputs is None:
        return {**report, "error": ratio(solution.loss, energy(w))}
    error = row.format.decode(solution.codes, solution.grid).sub_(w)
    return {
        **report,
        "error": ratio(energy(error), energy(w)),
        "output_error": ratio(solution.loss, outputs),
        "steps": [asdict(step) for step in solution.steps],
        "tokens": stats.tokens,
        "borrowed": stats.borrowed,
        "dropped": stats.dropped,
    }


@phase("put")
def put(prepared: Prepared, swap: WeightSwap, row: Row, solution: Solution) -> None:
    again = partial(row.format.decode, solution.codes, solution.grid)
    swap.put(prepared.model, row.target, again(), again)
