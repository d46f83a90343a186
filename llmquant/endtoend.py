"""After the last block: all of them are trained together, and written anew where that was for the better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llmquant import teacher, tune
from llmquant.calibration import Streams
from llmquant.estimate import Row
from llmquant.job import Prepared, Progress
from llmquant.output import CALIBRATION, LEAN, OutputFolder
from llmquant.saving import matrices, moved_vectors, part_of, save_block, written
from llmquant.solvers import Solution
from llmquant.solving import Result
from llmquant.stats import energy, ratio


def tune_all(
    prepared: Prepared, folder: OutputFolder, streams: Streams, wanted: list[Tensor], progress: Progress
) -> dict[str, Any]:
    """Train all blocks together, and write them anew where that was for the better. Returns what is noted of it.

    wanted: of every window what leaves the last block in the reference, (length, hidden). One process does all of it.
    """
    model, job = prepared.model, prepared.job
    if not all(part_of(model, block, anew=True) in folder.records for block in model.places):
        windows = load_file(folder.partial / CALIBRATION)["tokens"]
        means, vectors = prepared.plan.tuning, model.vectors()
        assert means is not None
        with model.whole():
            for index in range(len(model.block_names)):
                for _, parameter, value in moved_vectors(prepared, written(folder, index)):
                    parameter.data = value
            tuned = tune.tune(
                model,
                [matrix for block in model.places for matrix in _leaning(prepared, folder, block)],
                {name: prepared.checkpoint.dtype(key) for name, key in vectors.items()},
                windows,
                teacher.All(model, windows, wanted),
                streams.held_windows(),
                steps=job.tuning,
                batch=len(streams.batches[0]),
                rates=tune.Rates() if means.shifts else tune.Rates(shift=0.0),
                recompute=means.recompute,
                seed=job.seed,
                progress=partial(progress, "tune"),
            )
            noted = {"kept": tuned.kept, "divergences": tuned.divergences, "codes": means.shifts}
            if not tuned.kept:
                return {"tuning": noted}
            found = {matrix.target.name: matrix for matrix in tuned.matrices}
            changed = {vectors[name]: vector for name, vector in tuned.vectors.items()}
            for block in model.places:
                rows = prepared.plan.of_block(block)
                results = [_tuned(prepared, folder, row, found[row.target.name]) for row in rows]
                save_block(prepared, folder, block, results, anew=True, changed=changed, noted={"tuning": noted})
    return {"tuning": folder.records[part_of(model, 0, anew=True)]["tuning"]}


def keep_lean(folder: OutputFolder, block: int, results: list[Result]) -> None:
    """What solutions say beyond codes and grids, of which only the tuning of all blocks will know the use."""
    lean = {result.row.target.name: result.solution.lean for result in results}
    tensors = {name: tensor.cpu() for name, tensor in lean.items() if tensor is not None}
    if tensors:
        folder.kept(LEAN.format(block), lambda: tensors)


def _leaning(prepared: Prepared, folder: OutputFolder, block: int | None) -> Iterator[tune.Matrix]:
    """The quantized matrices of a block, with what their solutions said beyond that."""
    kept = folder.partial / LEAN.format(block)
    leans = load_file(kept, device=str(prepared.model.device)) if kept.is_file() else {}
    part = part_of(prepared.model, block)
    for matrix in matrices(prepared, block, written(folder, part).tensors):
        yield replace(matrix, lean=leans.get(matrix.target.name))


def _tuned(prepared: Prepared, folder: OutputFolder, row: Row, matrix: tune.Matrix) -> Result:
    """As a result, with the error that it has now: of its outputs nothing is known any more.

    Where scales were moved, the original weight is no measure: the errors noted are those before tuning.
    """
    record = folder.records[part_of(prepared.model, row.block)]
    report = next(report for report in record["report"] if report["name"] == row.target.name)
    if any(row.target.name in (note["source"], *note["readers"]) for note in record.get("scaled", [])):
        return Result(row, Solution(matrix.codes, matrix.grid, report["loss"]), {**report, "tuned": True})
    w = row.target.matrix(prepared.model.module(row.target)).detach().float()
    loss = energy(row.format.decode(matrix.codes, matrix.grid).sub_(w))
    report = {key: value for key, value in report.items() if key != "output_error"}
    report |= {"loss": loss, "error": ratio(loss, energy(w)), "tuned": True}
    return Result(row, Solution(matrix.codes, matrix.grid, loss), report)
