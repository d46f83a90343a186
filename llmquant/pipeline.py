"""The story of a run: for each block, calibrate, solve, save, verify, advance."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from llmquant import chats, equivalence, recovery, rotation, text, tune, verification
from llmquant.blocks import StreamedModel
from llmquant.calibration import Stage, Streams, WeightSwap, stages, summed_windows
from llmquant.checkpoint import Checkpoint, locate
from llmquant.curvature import curvature
from llmquant.equivalence import Place
from llmquant.errors import (
    CheckpointError,
    DataError,
    LlmquantError,
    NonFiniteInput,
    OutputError,
    PlanError,
    VerificationError,
)
from llmquant.estimate import Row, Work
from llmquant.formats.base import all_finite
from llmquant.matrices import Target, loader_of
from llmquant.output import CALIBRATION, CURVATURE, LEAN, OutputFolder, check_usable
from llmquant.plan import Plan, make_plan
from llmquant.recipe import Recipe
from llmquant.scaling import Scales, awq, balance
from llmquant.solvers import TUNERS, Solution, default_of
from llmquant.solvers.block_tuning import Part
from llmquant.stats import Stats, energy
from llmquant.verification import Verification
from llmquant.version import __version__

SCALED = ("awq", "gptq")  # solvers before which scales are moved

# progress(what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """The progress of a run that nobody watches."""


@dataclass(frozen=True)
class Calibration:
    """What is shown to the model: `samples` windows of `length` tokens.

    source: "self" (the model's own samples), a text, JSON, JSONL or parquet file, a dataset id, or token ids: a
    .safetensors with a tensor `tokens` (windows, length) int64. length None: that of given tokens, else 512, or the
    model's limit where that is lower. curvature: the share of the windows over which a backward pass finds out how the
    loss curves, for the last step of rounding; 0: none.
    """

    source: str = "self"
    samples: int = 128
    length: int | None = None
    batch: int = 8
    curvature: float = 0.25


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of a result. tuning: steps of end-to-end tuning after the last block."""

    model: str
    recipe: Recipe
    calibration: Calibration | None = Calibration()
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    tuning: int = 0
    trust_remote_code: bool = False
    rotate: str = "none"  # one of rotation.MODES

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "llmquant": __version__,
            "recipe": self.recipe.to_json(),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "rotate": self.rotate,
            "seed": self.seed,
            "device": self.device,
            "dtype": str(self.dtype),
            "tuning": self.tuning,
            "source": checkpoint.fingerprint(),
        }


@dataclass(frozen=True)
class Prepared:
    """A job whose plan has been made: everything checked, nothing yet done."""

    job: Job
    checkpoint: Checkpoint
    model: StreamedModel
    plan: Plan
    length: int
    offload: Path | None = None  # where the hidden states of calibration lie, if not in memory


def prepare(
    job: Job,
    output: Path,
    *,
    overwrite: bool = False,
    offload: Path | None = None,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Read headers, make the plan, check the output folder. Raises the LlmquantError that says what is wrong.

    offload: a folder for the hidden states of calibration; they go to the output's own where they do not fit into
    memory. max_memory: bytes, beyond which the plan is refused. Neither changes a byte of the result.
    To rotate a model, its weights are read too: whether it can be is tried.
    """
    check_usable(output, overwrite=overwrite)
    if offload is not None and not offload.is_dir():
        raise OutputError(f"{offload}: no such folder: make it, or name another with --offload-activations")
    turning = partial(progress, "rotate")
    checkpoint, model = rotation.opened(
        Checkpoint(locate(job.model)), job.rotate, job.seed, dtype=job.dtype, progress=turning, **_place(job)
    )
    calibration = job.calibration
    length = 0
    if calibration is not None:
        if not model.causal:
            raise PlanError(
                f"{job.model}: {type(model.model).__name__} is no causal language model, and calibration shows text to "
                "those only: use --quality fast, which reads weights only"
            )
        length = _length(model.config, calibration)
    plan = make_plan(checkpoint, model, job.recipe, output, _work(job, length, offload), max_memory)
    return Prepared(job, checkpoint, model, plan, length, offload)


def _work(job: Job, length: int, offload: Path | None) -> Work:
    calibration = job.calibration
    if calibration is None:
        return Work()
    return Work(
        tokens=calibration.samples * length,
        batch=min(calibration.batch, calibration.samples) * length,
        curvature=calibration.curvature,
        sampled=calibration.source == "self",
        tuning=job.tuning,
        offload=offload is not None,
    )


def _place(job: Job) -> dict[str, Any]:
    """How a StreamedModel of the job is made, whatever its type."""
    return {"device": job.device, "trust_remote_code": job.trust_remote_code}


@torch.no_grad()
def quantize(
    prepared: Prepared, output: Path, *, overwrite: bool = False, verify: bool = True, progress: Progress = silent
) -> dict[str, Any]:
    """Carry out the plan, or what is left of it from a run that was cut. Returns the manifest.

    verify: read the result back and compare it with the original (see verification.py) before it gets its name. Raises
    VerificationError where they are further apart than the format explains.

    A KeyboardInterrupt leaves OUTPUT.partial, which the same call takes up again.
    """
    job, model, plan = prepared.job, prepared.model, prepared.plan
    blocks = len(model.block_names)
    shard = partial("model-{:05d}-of-{:05d}.safetensors".format)
    settings = {**job.settings(prepared.checkpoint), "codes_tuned": plan.tuning is not None and plan.tuning.shifts}
    with OutputFolder(output, settings, overwrite=overwrite) as folder:
        streams, curves = _calibrate(prepared, folder, progress)
        places = [] if streams is None else _places(prepared, progress)
        for block in range(blocks):
            done = sum(row.weights for earlier in range(block) for row in plan.of_block(earlier))
            step = partial(_progress_within, progress, f"block {block + 1} of {blocks}", done, plan.weights)
            if block in folder.records and streams is None:
                continue
            model.load_block(block)
            swap = WeightSwap()
            if block in folder.records:
                _restore(prepared, folder, block, swap)
            else:
                scales = None if streams is None else Scales(streams, block, swap, places[block])
                results = _solve_block(prepared, block, streams, curves, swap, scales, step)
                _keep_lean(folder, block, results)
                changed, noted = (None, None) if scales is None else (scales.stored(), scales.to_json())
                name = shard(block + 1, blocks + 1)
                _save_block(prepared, folder, block, name, results, changed=changed, noted=noted)
            if streams is not None and (block + 1 < blocks or job.tuning or plan.of_block(None)):
                streams.advance(block, swap)
            model.unload_block(block)
        if blocks not in folder.records:
            _save_block(prepared, folder, None, shard(blocks + 1, blocks + 1), _solve_outside(prepared, streams))
        tuning = _tune(prepared, folder, streams, progress) if streams is not None and job.tuning else {}
        progress("finish", plan.weights, plan.weights)
        folder.assemble(_config(prepared), prepared.checkpoint.companions())
        manifest = {**_manifest(prepared, folder), **tuning}
        if not verify:
            folder.finish(manifest)
            return manifest
        found = _verify(prepared, folder, manifest, progress)
        folder.finish(manifest | {"verification": found.to_json()})
    return manifest | {"verification": found.to_json() | {"seconds": found.seconds}}


def _progress_within(progress: Progress, what: str, before: int, total: int, done: int) -> None:
    progress(what, before + done, total)


# ---- calibration


def _calibrate(
    prepared: Prepared, folder: OutputFolder, progress: Progress
) -> tuple[Streams | None, dict[str, Tensor]]:
    """The streams that enter the first block, and the curvature where it is wanted."""
    calibration = prepared.job.calibration
    if calibration is None:
        return None, {}
    windows = folder.kept(CALIBRATION, lambda: {"tokens": _windows(prepared, calibration, progress)})["tokens"]
    place = (prepared.offload or folder.partial) if prepared.plan.offload else None
    streams = Streams.start(prepared.model, windows, calibration.batch, partial(progress, "embed"), place)
    if not calibration.curvature:
        return streams, {}
    spill = place or folder.partial
    return streams, folder.kept(CURVATURE, lambda: _curvature(prepared, windows, calibration, spill, progress))


def _curvature(
    prepared: Prepared, windows: Tensor, calibration: Calibration, spill: Path, progress: Progress
) -> dict[str, Tensor]:
    """G of the outputs of linears and blocks, by name, from a share of the windows, none of them held out.

    Nothing for a model whose blocks hand on more than hidden states: the steps that need it are then left out.
    """
    count = min(math.ceil(calibration.curvature * len(windows)), summed_windows(len(windows)))
    try:
        found = curvature(
            prepared.model,
            windows[:count],
            batch=calibration.batch,
            seed=prepared.job.seed,
            spill=spill,
            memory=0 if prepared.plan.offload else 2**32,
            progress=partial(progress, "curvature"),
        )
    except PlanError as error:
        logging.getLogger(__name__).warning("%s: rounding goes on without the curvature of the loss", error)
        return {}
    return {name: part.blocks for name, part in found.items()}


def _length(config: transformers.PretrainedConfig, calibration: Calibration) -> int:
    """Tokens of a window: as asked, as in the tokens that are given, or as the model allows."""
    if text.holds_tokens(calibration.source):
        return text.token_length(calibration.source, config, calibration.length)
    return text.window_length(config, calibration.length or min(512, text.window_length(config)))


def _windows(prepared: Prepared, calibration: Calibration, progress: Progress) -> Tensor:
    """Calibration tokens (samples, length) int64."""
    job, folder, config = prepared.job, prepared.checkpoint.folder, prepared.model.config.get_text_config()
    if text.holds_tokens(calibration.source):
        return text.read_tokens(calibration.source, count=calibration.samples, vocabulary=config.vocab_size)
    if calibration.source != "self":
        tokenizer = text.load_tokenizer(folder, job.trust_remote_code)
        return text.calibration_windows(
            tokenizer, calibration.source, count=calibration.samples, length=prepared.length, seed=job.seed
        )
    _check_room(prepared)
    model = loader_of(prepared.checkpoint.config()).from_pretrained(
        folder, dtype=prepared.model.dtype, trust_remote_code=job.trust_remote_code
    )
    windows = text.sample_windows(
        model.to(job.device).eval(),
        bos_token_id=config.bos_token_id,
        count=calibration.samples,
        length=prepared.length,
        seed=job.seed,
        turns=_turns(prepared),
        progress=partial(progress, "sample"),
    )
    return windows.cpu()


def _turns(prepared: Prepared) -> chats.Turns | None:
    """How the model's conversations go; None where there is no chat template, or none that can be used."""
    folder = prepared.checkpoint.folder
    try:
        turns = chats.turns(text.load_tokenizer(folder, prepared.job.trust_remote_code))
        if turns is not None and 2 * (size := len(turns.opening) + len(turns.reply)) > prepared.length:
            raise DataError(f"{folder}: the chat template's own {size} tokens fill most of {prepared.length}")
    except (CheckpointError, DataError) as error:
        logging.getLogger(__name__).warning("%s: the model's samples are plain text, no conversations", error)
        return None
    return turns


def _check_room(prepared: Prepared) -> None:
    """The model's own samples need all of it in memory at once, which nothing else here does."""
    need = sum(prepared.checkpoint.nbytes(name) for name in prepared.checkpoint.names())
    device = torch.device(prepared.job.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > 0.9 * free:
        raise DataError(
            f"the model's own samples need all of it in memory: {need:,} bytes, {free:,} are free: give text with "
            "--calibration FILE, or use --quality fast, which needs none"
        )


def _places(prepared: Prepared, progress: Progress) -> list[list[Place]]:
    """Of every block, where scales can be moved, if a solver wants it; float32 shows it."""
    if not any(row.rule.solver in SCALED for row in prepared.plan.rows):
        return [[] for _ in prepared.model.block_names]
    checkpoint, place = prepared.checkpoint, _place(prepared.job)
    model = StreamedModel(checkpoint, dtype=torch.float32, **place, untied=checkpoint.untied)
    return equivalence.find_all(model, partial(progress, "scales"))


# ---- one block


@dataclass(frozen=True)
class Result:
    """What came of one matrix, and the figures that are noted of it."""

    row: Row
    solution: Solution
    report: dict[str, Any]
    rival: Result | None = None


def _solve_block(
    prepared: Prepared,
    block: int,
    streams: Streams | None,
    curves: dict[str, Tensor],
    swap: WeightSwap,
    scales: Scales | None,
    step: Callable[[int], None],
) -> list[Result]:
    """Stage by stage in the order of the forward pass, so that each sees the inputs its quantized predecessors give."""
    rows = {row.target.name: row for row in prepared.plan.of_block(block)}
    order = [] if streams is None else stages(prepared.model, block, streams)
    if streams is not None:
        streams.remember(block, order)
    reached = {target.name for stage in order for target in stage.targets}
    order += [Stage([row.target]) for name, row in rows.items() if name not in reached]
    results: dict[str, Result] = {}
    for stage in order:
        wanted = [rows[target.name] for target in stage.targets if target.name in rows]
        if not wanted:
            continue
        seen: Iterable[tuple[Target, Stats | None]] = ((target, None) for target in stage.targets)
        if scales is not None and stage.targets[0].name in reached and any(_needs_stats(row) for row in wanted):
            seen = _scaled(scales, rows, stage)
        for target, stats in seen:
            if (row := rows.get(target.name)) is None:
                continue
            if scales is None or stats is None:
                result = _solve(row, row.target.matrix(prepared.model.module(row.target)).detach(), None)
            else:
                own = replace(stats, curvature=scales.curvature(target.name, curves.get(target.name)))
                result = _solve(row, scales.matrix(target.name), own)
            results[row.target.name] = result
            if streams is not None:
                _put(prepared, swap, row, result.solution)
            step(sum(result.row.weights for result in results.values()))
        if streams is not None:
            solved = [results[row.target.name] for row in wanted]
            for result in _judged(prepared, block, streams, curves, swap, solved):
                results[result.row.target.name] = result
    if streams is not None:
        results |= _block_tuned(prepared, block, streams, curves, swap, results)
    return [results[name] for name in rows]


def _needs_stats(row: Row) -> bool:
    return row.rule.solver not in TUNERS


def _scaled(scales: Scales, rows: dict[str, Row], stage: Stage) -> Iterable[tuple[Target, Stats]]:
    """Move scales where the solver wants it, into the columns of a stage or from its rows.

    Returns the targets of the stage with the statistics of what they read then.
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
    seen = scales.streams.statistics(scales.block, stage, scales.swap)
    for place, solver in places:
        if solver == "gptq" and place.offset is not None and names == list(place.readers):
            stats = balance(scales, place, next(iter(seen))[1], formats)  # which all targets share
            seen = ((target, stats) for target in stage.targets)
    return seen


def _judged(
    prepared: Prepared,
    block: int,
    streams: Streams,
    curves: dict[str, Tensor],
    swap: WeightSwap,
    results: list[Result],
) -> Iterator[Result]:
    """Each result whose rival brings the block's outputs nearer to the reference on held-out tokens, with the rival."""
    if not any(streams.held) or not any(result.rival for result in results):
        return
    metric = curves.get(prepared.model.block_names[block])
    least = streams.block_error(block, swap, metric)
    for group in _groups(results):
        rivals = [result.rival for result in group if result.rival is not None]
        if not rivals:
            continue
        for rival in rivals:
            _put(prepared, swap, rival.row, rival.solution)
        error = streams.block_error(block, swap, metric)
        noted = {"name": "two-sided", "error": error, "before": least, "kept": error < least}
        for result in group:
            chosen = result.rival if error < least and result.rival is not None else result
            _put(prepared, swap, chosen.row, chosen.solution)
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
        before = streams.block_error(block, swap, metric) if any(streams.held) else None
        solutions = _tune_block(prepared, block, streams, swap, mine)
        for name, solution in solutions.items():
            _put(prepared, swap, mine[name].row, solution)
        after = None if before is None else streams.block_error(block, swap, metric)
        kept = before is None or after is None or after < before
        step = {"name": "tuning", "error": after, "before": before, "kept": kept}
        for name, result in mine.items():
            w = _original(swap, result.row)
            solution = solutions[name] if kept else result.solution
            _put(prepared, swap, result.row, solution)
            report = {**_report(result.row, w, solution, None, None), "solver": result.row.rule.solver, "steps": [step]}
            found[name] = Result(result.row, solution, report)
    return found


def _original(swap: WeightSwap, row: Row) -> Tensor:
    """The weight (out, in) float32 as it was before anything took its place."""
    return row.target.seen(swap.pairs[row.target.parameter][1]).float()


def _tune_block(
    prepared: Prepared, block: int, streams: Streams, swap: WeightSwap, results: dict[str, Result]
) -> dict[str, Solution]:
    """Matrices of one rule, from the grids of `results`, by the gradients of what the block puts out."""
    rows = {name: result.row for name, result in results.items()}
    parts = {name: Part(_original(swap, row), row.format, results[name].solution.grid) for name, row in rows.items()}
    wanted = streams.outputs(block, swap)

    def gradient(batch: int, weights: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        for name, weight in weights.items():
            _put_weight(prepared, swap, rows[name], weight)
        return streams.gradient(block, batch, wanted[batch], [row.target for row in rows.values()])

    rule = next(iter(rows.values())).rule
    seed = prepared.job.seed * len(prepared.model.block_names) + block
    return TUNERS[rule.solver](parts, gradient, len(wanted), seed, **rule.options)


def _solve_outside(prepared: Prepared, streams: Streams | None) -> list[Result]:
    """What rules name outside the blocks: on what leaves the last of them, or from the weights alone."""
    rows, model = prepared.plan.of_block(None), prepared.model
    if not rows:
        return []
    model.load_outside()
    results = []
    for row in rows:
        calibrated = streams is not None and isinstance(model.module(row.target), nn.Linear)
        stats = streams.behind_blocks(row.target) if streams is not None and calibrated else None
        results.append(_solve(row, row.target.matrix(model.module(row.target)).detach(), stats))
    model.unload_outside()
    return results


def _solve(row: Row, weight: Tensor, stats: Stats | None) -> Result:
    """weight (out, in) in the model's type."""
    w = weight.float()
    name, options = row.rule.solver, row.rule.options
    if name in TUNERS:  # where tuning starts
        name, options = "rtn", {"clip": options.get("clip", default_of(TUNERS[name], "clip"))}
    try:
        solution, name, noted = recovery.solve(w, stats, row.format, name, options, calibrated=row.block is not None)
    except LlmquantError as error:
        raise type(error)(f"{row.key}: {error}") from None
    outputs = None if stats is None else stats.output_energy(w)  # as dear as a step of the solver, and wanted twice
    facts = {"solver": name, **({"recoveries": noted} if noted else {})}
    rival = None
    if solution.rival is not None:
        rival = Result(row, solution.rival, {**_report(row, w, solution.rival, stats, outputs), **facts})
    return Result(row, solution, {**_report(row, w, solution, stats, outputs), **facts}, rival)


def _report(row: Row, w: Tensor, solution: Solution, stats: Stats | None, outputs: float | None) -> dict[str, Any]:
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
        return {**report, "error": _ratio(solution.loss, energy(w))}
    error = row.format.decode(solution.codes, solution.grid).sub_(w)
    return {
        **report,
        "error": _ratio(energy(error), energy(w)),
        "output_error": _ratio(solution.loss, outputs),
        "steps": [asdict(step) for step in solution.steps],
        "tokens": stats.tokens,
        "borrowed": stats.borrowed,
        "dropped": stats.dropped,
    }


def _put(prepared: Prepared, swap: WeightSwap, row: Row, solution: Solution) -> None:
    _put_weight(prepared, swap, row, row.format.decode(solution.codes, solution.grid))


def _put_weight(prepared: Prepared, swap: WeightSwap, row: Row, weight: Tensor) -> None:
    parameter = prepared.model.model.get_parameter(row.target.parameter)
    stored = row.target.stored(weight.to(prepared.model.dtype))
    swap.replace(row.target.parameter, parameter, stored, row.target.expert)


def _save_block(
    prepared: Prepared,
    folder: OutputFolder,
    block: int | None,
    shard: str,
    results: list[Result],
    *,
    part: int | None = None,
    changed: dict[str, Tensor] | None = None,
    noted: dict[str, Any] | None = None,
) -> None:
    """block None: all that lies outside the blocks, as the last part.

    part: its number, where it is not the first that is written of the block; changed: what the file gets, of whatever
    blocks, in place of the checkpoint's own tensors; noted: of this part, besides the report.
    """
    model = prepared.model
    quantized = {name for result in results for name in result.row.sources}
    keys = model.outside_keys() if block is None else model.block_keys(block)
    dense = [name for name in keys if name not in quantized]
    tensors = {name: (changed or {}).get(name, own) for name, own in prepared.checkpoint.tensors(dense).items()}
    experts: dict[str, list[Tensor]] = {}
    for result in results:
        for suffix, tensor in result.row.format.pack(result.solution.codes, result.solution.grid).items():
            if result.row.target.expert is None:
                tensors[_stored_name(result.row, suffix)] = tensor.cpu()
            else:
                experts.setdefault(_stored_name(result.row, suffix), []).append(tensor.cpu())
    tensors |= {name: torch.stack(parts) for name, parts in experts.items()}

    def check(read: dict[str, Tensor]) -> dict[str, Any]:
        _check_dense({name: read[name] for name in dense})
        for result in results:
            _check_result(result, read)
        return {"report": [result.report for result in results], **(noted or {})}

    first = len(model.block_names) if block is None else block
    folder.write_shard(first if part is None else part, shard, tensors, check)


def _stored_name(row: Row, suffix: str) -> str:
    return row.key.removesuffix("weight") + suffix


def _stored(row: Row, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {suffix: tensors[_stored_name(row, suffix)] for suffix in row.format.layout(row.target.shape)}
    expert = row.target.expert
    return found if expert is None else {suffix: tensor[expert] for suffix, tensor in found.items()}


def _check_dense(read: dict[str, Tensor]) -> dict[str, Any]:
    for name, tensor in read.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not all_finite(tensor):
            raise NonFiniteInput(f"{name}: holds NaN or Inf: the checkpoint is damaged")
    return {}


def _check_result(result: Result, read: dict[str, Tensor]) -> None:
    """What was read back must unpack to what was solved, bit for bit: so the errors noted are those of the file."""
    row, solution = result.row, result.solution
    codes, grid = row.format.unpack(_stored(row, read), row.target.shape)
    if not (torch.equal(codes, solution.codes.cpu()) and grid.equals(solution.grid)):
        raise VerificationError(f"{row.key}: what was read back is not what was solved: please report this")


def _ratio(error: float, signal: float) -> float:
    """Root of error energy over signal energy; 0 for nothing lost of nothing."""
    return 0.0 if error == 0 else math.sqrt(error / signal) if signal else math.inf


def _restore(prepared: Prepared, folder: OutputFolder, block: int, swap: WeightSwap) -> None:
    """Put the block's quantized weights in place from the shard that an earlier run left."""
    for row, matrix in zip(prepared.plan.of_block(block), _matrices(prepared, folder, block), strict=True):
        _put(prepared, swap, row, Solution(matrix.codes, matrix.grid, 0.0))
    for name, parameter, value in _vectors(prepared, folder, block):
        swap.replace(name, parameter, value)


# ---- tuning


def _tune(prepared: Prepared, folder: OutputFolder, streams: Streams, progress: Progress) -> dict[str, Any]:
    """Train all blocks together, and write them anew where that was for the better. Returns what is noted of it."""
    model, job = prepared.model, prepared.job
    places = [*range(len(model.block_names)), None]
    parts = range(len(places), 2 * len(places))
    if not all(part in folder.records for part in parts):
        windows = load_file(folder.partial / CALIBRATION)["tokens"]
        means, vectors = prepared.plan.tuning, model.vectors()
        assert means is not None
        with _whole(model):
            for block in places[:-1]:
                for _, parameter, value in _vectors(prepared, folder, block):
                    parameter.data = value
            tuned = tune.tune(
                model,
                [matrix for block in places for matrix in _leaning(prepared, folder, block)],
                {name: prepared.checkpoint.dtype(key) for name, key in vectors.items()},
                windows,
                torch.cat(streams.reference),
                streams.held_windows(),
                steps=job.tuning,
                batch=len(streams.reference[0]),
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
            for part, block in zip(parts, places, strict=True):
                name = f"tuned-{part - len(places) + 1:05d}-of-{len(places):05d}.safetensors"
                results = [
                    _tuned(prepared, folder, row, found[row.target.name]) for row in prepared.plan.of_block(block)
                ]
                _save_block(prepared, folder, block, name, results, part=part, changed=changed, noted={"tuning": noted})
    return {"tuning": folder.records[parts[0]]["tuning"]}


def _keep_lean(folder: OutputFolder, block: int, results: list[Result]) -> None:
    """What solutions say beyond codes and grids, of which only the tuning of all blocks will know the use."""
    lean = {result.row.target.name: result.solution.lean for result in results}
    tensors = {name: tensor.cpu() for name, tensor in lean.items() if tensor is not None}
    if tensors:
        folder.kept(LEAN.format(block), lambda: tensors)


@contextmanager
def _whole(model: StreamedModel) -> Iterator[None]:
    """The whole model in memory."""
    blocks = range(len(model.block_names))
    model.load_outside()
    for block in blocks:
        model.load_block(block)
    yield
    for block in blocks:
        model.unload_block(block)
    model.unload_outside()


def _matrices(prepared: Prepared, folder: OutputFolder, block: int | None) -> list[tune.Matrix]:
    """The quantized matrices of a block, from the shard that has been written of it."""
    part = len(prepared.model.block_names) if block is None else block
    tensors = load_file(folder.partial / folder.records[part]["shard"])
    found = []
    for row in prepared.plan.of_block(block):
        codes, grid = row.format.unpack(_stored(row, tensors), row.target.shape)
        device = prepared.model.device
        found.append(tune.Matrix(row.target, row.format, codes.to(device), grid.to(device)))
    return found


def _vectors(prepared: Prepared, folder: OutputFolder, block: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """(name in memory, parameter, value) of norms and biases from which scales were moved, from the block's shard."""
    record = folder.records[block]
    tensors = load_file(folder.partial / record["shard"])
    for name in record.get("changed", []):
        parameter, key = prepared.model.model.get_parameter(name), prepared.model.source_key(name)
        assert key is not None
        yield name, parameter, tensors[key].to(parameter)


def _leaning(prepared: Prepared, folder: OutputFolder, block: int | None) -> Iterator[tune.Matrix]:
    """The quantized matrices of a block, with what their solutions said beyond that."""
    kept = folder.partial / LEAN.format(block)
    leans = load_file(kept, device=str(prepared.model.device)) if kept.is_file() else {}
    for matrix in _matrices(prepared, folder, block):
        yield replace(matrix, lean=leans.get(matrix.target.name))


def _tuned(prepared: Prepared, folder: OutputFolder, row: Row, matrix: tune.Matrix) -> Result:
    """As a result, with the error that it has now: of its outputs nothing is known any more.

    Where scales were moved, the original weight is no measure: the errors noted are those before tuning.
    """
    part = len(prepared.model.block_names) if row.block is None else row.block
    record = folder.records[part]
    report = next(report for report in record["report"] if report["name"] == row.target.name)
    if any(row.target.name in (note["source"], *note["readers"]) for note in record.get("scaled", [])):
        return Result(row, Solution(matrix.codes, matrix.grid, report["loss"]), {**report, "tuned": True})
    w = row.target.matrix(prepared.model.module(row.target)).detach().float()
    loss = energy(row.format.decode(matrix.codes, matrix.grid).sub_(w))
    report = {key: value for key, value in report.items() if key != "output_error"}
    report |= {"loss": loss, "error": _ratio(loss, energy(w)), "tuned": True}
    return Result(row, Solution(matrix.codes, matrix.grid, loss), report)


# ---- the end


def _verify(prepared: Prepared, folder: OutputFolder, manifest: dict[str, Any], progress: Progress) -> Verification:
    """On a few held-out windows, or on random tokens where there is no text."""
    windows = verification.random_windows(prepared.model, seed=prepared.job.seed)
    if prepared.job.calibration is not None:
        windows = load_file(folder.partial / CALIBRATION)["tokens"][-verification.WINDOWS :, : verification.LENGTH]
    found = verification.verify(
        folder.partial,
        prepared.model,
        windows,
        manifest=manifest,
        trust_remote_code=prepared.job.trust_remote_code,
        progress=progress,
    )
    found.check(folder.partial, "it keeps this name: please report it, or repeat the command with --no-verify")
    return found


def _config(prepared: Prepared) -> dict[str, Any]:
    quantization = {"quant_method": "llmquant", "version": __version__, "formats": prepared.plan.modules()}
    return {**prepared.checkpoint.config(), "quantization_config": quantization}


def _manifest(prepared: Prepared, folder: OutputFolder) -> dict[str, Any]:
    """All about the run that does not depend on when and where it ran."""
    plan, job = prepared.plan, prepared.job
    scaled = [note for part in sorted(folder.records) for note in folder.records[part].get("scaled", [])]
    written = [report for part in sorted(folder.records) for report in folder.records[part].get("report", [])]
    reports = list({report["name"]: report for report in written}.values())  # a block written anew counts as it is now
    versions = {
        "llmquant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
    return {
        "versions": versions,
        "model": Path(job.model).name if Path(job.model).is_dir() else job.model,
        "settings": {key: value for key, value in folder.settings.items() if key != "source"},
        "threads": torch.get_num_threads(),
        "bits_per_weight": plan.bits_per_weight,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "kept_dense": [asdict(kept) for kept in plan.kept],
        "recoveries": recovery.of_run(reports),
        **({"experts": experts} if (experts := recovery.coverage(reports)) else {}),
        "scaled": scaled,
        "tensors": reports,
        "histograms": [_histogram(prepared, folder, row) for row in _worst(plan.rows, reports)],
    }


def _worst(rows: Iterable[Row], reports: list[dict[str, Any]]) -> list[Row]:
    """Three matrices, by the error of their outputs where that is known."""
    worst = sorted(reports, key=lambda report: -report.get("output_error", report["error"]))[:3]
    named = {row.target.name: row for row in rows}
    return [named[report["name"]] for report in worst]


def _histogram(prepared: Prepared, folder: OutputFolder, row: Row) -> dict[str, Any]:
    """Counts of a matrix's weights before and after, in 64 equal bins; before: as the checkpoint has them."""
    model, written = prepared.model, Checkpoint(folder.partial)
    stored = _stored(
        row, written.tensors([_stored_name(row, suffix) for suffix in row.format.layout(row.target.shape)])
    )
    after = row.format.decode(*row.format.unpack(stored, row.target.shape))
    if row.block is None:
        model.load_outside()
    else:
        model.load_block(row.block)
    before = row.target.matrix(model.module(row.target)).detach().float().cpu()
    if row.block is None:
        model.unload_outside()
    else:
        model.unload_block(row.block)
    low, high = (float(end) for end in torch.aminmax(before))
    counts = [torch.histc(w.clamp(low, high), 64, low, high).int().tolist() for w in (before, after)]
    return {"name": row.target.name, "low": low, "high": high, "before": counts[0], "after": counts[1]}
