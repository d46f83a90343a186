"""The story of a run: for each block, calibrate, solve, save, verify, advance."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from llmquant import text
from llmquant.blocks import StreamedModel
from llmquant.calibration import Stage, Streams, WeightSwap, stages
from llmquant.checkpoint import Checkpoint, locate
from llmquant.curvature import curvature
from llmquant.errors import DataError, LlmquantError, NonFiniteInput, PlanError, VerificationError
from llmquant.formats.base import all_finite
from llmquant.output import CALIBRATION, CURVATURE, OutputFolder, check_usable
from llmquant.plan import Plan, Row, make_plan
from llmquant.recipe import Recipe
from llmquant.solvers import CALIBRATED, SOLVERS, Solution
from llmquant.stats import Stats, energy
from llmquant.version import __version__

# progress(what is being done, units done, units in all)
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """The progress of a run that nobody watches."""


@dataclass(frozen=True)
class Calibration:
    """What is shown to the model: `samples` windows of `length` tokens.

    source: "self" (the model's own samples), a text, JSON, JSONL or parquet file, or a dataset id.
    length None: 512, or the model's limit where that is lower. curvature: whether a backward pass over a quarter of
    the windows finds out how the loss curves, for the last step of rounding.
    """

    source: str = "self"
    samples: int = 128
    length: int | None = None
    batch: int = 8
    curvature: bool = True


@dataclass(frozen=True)
class Job:
    """All that decides the bytes of a result."""

    model: str
    recipe: Recipe
    calibration: Calibration | None = Calibration()
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "llmquant": __version__,
            "recipe": self.recipe.to_json(),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "seed": self.seed,
            "device": self.device,
            "dtype": str(self.dtype),
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


def prepare(job: Job, output: Path, *, overwrite: bool = False) -> Prepared:
    """Read headers, make the plan, check the output folder. Raises the LlmquantError that says what is wrong."""
    check_usable(output, overwrite=overwrite)
    checkpoint = Checkpoint(locate(job.model))
    model = StreamedModel(checkpoint, device=job.device, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    calibration = job.calibration
    length = 0
    if calibration is not None:
        if not model.causal:
            raise PlanError(
                f"{job.model}: {type(model.model).__name__} is no causal language model, and calibration shows text to "
                "those only: use --quality fast, which reads weights only"
            )
        length = text.window_length(model.config, calibration.length or min(512, text.window_length(model.config)))
    tokens = 0 if calibration is None else calibration.samples * length
    return Prepared(job, checkpoint, model, make_plan(checkpoint, model, job.recipe, output, tokens), length)


@torch.no_grad()
def quantize(
    prepared: Prepared, output: Path, *, overwrite: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Carry out the plan, or what is left of it from a run that was cut. Returns the manifest.

    A KeyboardInterrupt leaves OUTPUT.partial, which the same call takes up again.
    """
    job, model, plan = prepared.job, prepared.model, prepared.plan
    blocks = len(model.block_names)
    shard = partial("model-{:05d}-of-{:05d}.safetensors".format)
    with OutputFolder(output, job.settings(prepared.checkpoint), overwrite=overwrite) as folder:
        streams, curves = _calibrate(prepared, folder, progress)
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
                name = shard(block + 1, blocks + 1)
                _save_block(prepared, folder, block, name, _solve_block(prepared, block, streams, curves, swap, step))
            if streams is not None and block + 1 < blocks:
                streams.advance(block, swap)
            model.unload_block(block)
        if blocks not in folder.records:
            _save_block(prepared, folder, None, shard(blocks + 1, blocks + 1), _solve_outside(prepared))
        progress("finish", plan.weights, plan.weights)
        manifest = _manifest(prepared, folder)
        folder.finish(_config(prepared), prepared.checkpoint.companions(), manifest)
    return manifest


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
    streams = Streams.start(prepared.model, windows, calibration.batch, partial(progress, "embed"))
    if not calibration.curvature:
        return streams, {}
    return streams, folder.kept(
        CURVATURE, lambda: _curvature(prepared, windows, calibration.batch, folder.partial, progress)
    )


def _curvature(prepared: Prepared, windows: Tensor, batch: int, spill: Path, progress: Progress) -> dict[str, Tensor]:
    """G of the outputs of linears and blocks, by name, from a quarter of the windows, none of them held out.

    Nothing for a model whose blocks hand on more than hidden states: the steps that need it are then left out.
    """
    some, progress_within = windows[: -(-len(windows) // 4)], partial(progress, "curvature")
    try:
        found = curvature(
            prepared.model, some, batch=batch, seed=prepared.job.seed, spill=spill, progress=progress_within
        )
    except PlanError as error:
        logging.getLogger(__name__).warning("%s: rounding goes on without the curvature of the loss", error)
        return {}
    return {name: part.blocks for name, part in found.items()}


def _windows(prepared: Prepared, calibration: Calibration, progress: Progress) -> Tensor:
    """Calibration tokens (samples, length) int64."""
    job, folder = prepared.job, prepared.checkpoint.folder
    if calibration.source != "self":
        tokenizer = text.load_tokenizer(folder, job.trust_remote_code)
        return text.calibration_windows(
            tokenizer, calibration.source, count=calibration.samples, length=prepared.length, seed=job.seed
        )
    _check_room(prepared)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=prepared.model.dtype, trust_remote_code=job.trust_remote_code
    )
    windows = text.sample_windows(
        model.to(job.device).eval(),
        bos_token_id=prepared.model.config.get_text_config().bos_token_id,
        count=calibration.samples,
        length=prepared.length,
        seed=job.seed,
        progress=partial(progress, "sample"),
    )
    return windows.cpu()


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
    step: Callable[[int], None],
) -> list[Result]:
    """Stage by stage in the order of the forward pass, so that each sees the inputs its quantized predecessors give."""
    rows = {row.target.name: row for row in prepared.plan.of_block(block)}
    order = [] if streams is None else stages(prepared.model, block, streams)
    reached = {target.name for stage in order for target in stage.targets}
    order += [Stage([row.target]) for name, row in rows.items() if name not in reached]
    results: dict[str, Result] = {}
    for stage in order:
        wanted = [rows[target.name] for target in stage.targets if target.name in rows]
        if not wanted:
            continue
        stats = None
        if streams is not None and stage.targets[0].name in reached:
            stats = streams.collect(block, stage, swap)
        for row in wanted:
            own = stats and replace(stats, curvature=curves.get(row.target.name))
            result = _solve(row, row.target.matrix(prepared.model.module(row.target)).detach(), own)
            results[row.target.name] = result
            if streams is not None:
                _put(prepared, swap, row, result.solution)
            step(sum(result.row.weights for result in results.values()))
        if streams is not None:
            solved = [results[row.target.name] for row in wanted]
            for result in _judged(prepared, block, streams, curves, swap, solved):
                results[result.row.target.name] = result
    return [results[name] for name in rows]


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
    for result in results:
        rival = result.rival
        if rival is None:
            continue
        _put(prepared, swap, result.row, rival.solution)
        error = streams.block_error(block, swap, metric)
        noted = {"name": "two-sided", "error": error, "before": least, "kept": error < least}
        steps = [*result.report["steps"], noted]
        if error < least:
            least = error
            yield Result(result.row, rival.solution, {**rival.report, "steps": steps})
        else:
            _put(prepared, swap, result.row, result.solution)
            yield Result(result.row, result.solution, {**result.report, "steps": steps})


def _solve_outside(prepared: Prepared) -> list[Result]:
    """What rules name outside the blocks, from the weights alone."""
    rows, model = prepared.plan.of_block(None), prepared.model
    if not rows:
        return []
    model.load_outside()
    results = [_solve(row, row.target.matrix(model.module(row.target)).detach(), None) for row in rows]
    model.unload_outside()
    return results


def _solve(row: Row, weight: Tensor, stats: Stats | None) -> Result:
    """weight (out, in) in the model's type."""
    w = weight.float()
    name, options = row.rule.solver, row.rule.options
    if stats is None and name in CALIBRATED:  # no token came through it: it lies outside the blocks, or idles
        name, options = "rtn", {key: value for key, value in options.items() if key == "clip"}
    try:
        solution = SOLVERS[name](w, stats, row.format, **options)
    except LlmquantError as error:
        raise type(error)(f"{row.key}: {error}") from None
    outputs = None if stats is None else stats.output_energy(w)  # as dear as a step of the solver, and wanted twice
    rival = None
    if solution.rival is not None:
        report = {**_report(row, w, solution.rival, stats, outputs), "solver": name}
        rival = Result(row, solution.rival, report)
    return Result(row, solution, {**_report(row, w, solution, stats, outputs), "solver": name}, rival)


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
    if stats is None or outputs is None:
        return {**report, "error": _ratio(solution.loss, energy(w))}
    error = row.format.decode(solution.codes, solution.grid).sub_(w)
    return {
        **report,
        "error": _ratio(energy(error), energy(w)),
        "output_error": _ratio(solution.loss, outputs),
        "steps": [asdict(step) for step in solution.steps],
        "tokens": stats.tokens,
        "dropped": stats.dropped,
    }


def _put(prepared: Prepared, swap: WeightSwap, row: Row, solution: Solution) -> None:
    decoded = row.format.decode(solution.codes, solution.grid).to(prepared.model.dtype)
    parameter = prepared.model.module(row.target).weight
    assert isinstance(parameter, nn.Parameter)
    swap.replace(row.target.name, parameter, row.target.stored(decoded))


def _save_block(prepared: Prepared, folder: OutputFolder, block: int | None, shard: str, results: list[Result]) -> None:
    """block None: all that lies outside the blocks, as the last part."""
    model = prepared.model
    quantized = {result.row.key for result in results}
    keys = model.outside_keys() if block is None else model.block_keys(block)
    dense = [name for name in keys if name not in quantized]
    tensors = prepared.checkpoint.tensors(dense)
    for result in results:
        for suffix, tensor in result.row.format.pack(result.solution.codes, result.solution.grid).items():
            tensors[_stored_name(result.row, suffix)] = tensor.cpu()

    def check(read: dict[str, Tensor]) -> dict[str, Any]:
        _check_dense({name: read[name] for name in dense})
        for result in results:
            _check_result(result, read)
        return {"report": [result.report for result in results]}

    folder.write_shard(len(model.block_names) if block is None else block, shard, tensors, check)


def _stored_name(row: Row, suffix: str) -> str:
    return row.key.removesuffix("weight") + suffix


def _stored(row: Row, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {suffix: tensors[_stored_name(row, suffix)] for suffix in row.format.layout(row.target.shape)}


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
    tensors = load_file(folder.partial / folder.records[block]["shard"])
    for row in prepared.plan.of_block(block):
        codes, grid = row.format.unpack(_stored(row, tensors), row.target.shape)
        device = prepared.model.device
        _put(prepared, swap, row, Solution(codes.to(device), grid.to(device), 0.0))


# ---- the end


def _config(prepared: Prepared) -> dict[str, Any]:
    quantization = {"quant_method": "llmquant", "version": __version__, "formats": prepared.plan.modules()}
    return {**prepared.checkpoint.config(), "quantization_config": quantization}


def _manifest(prepared: Prepared, folder: OutputFolder) -> dict[str, Any]:
    """All about the run that does not depend on when and where it ran."""
    plan, job = prepared.plan, prepared.job
    reports = [report for part in sorted(folder.records) for report in folder.records[part].get("report", [])]
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
        "tensors": reports,
        "histograms": [_histogram(prepared, folder, report["name"]) for report in _worst(reports)],
    }


def _worst(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of three matrices, by the error of their outputs where that is known."""
    return sorted(reports, key=lambda report: -report.get("output_error", report["error"]))[:3]


def _histogram(prepared: Prepared, folder: OutputFolder, name: str) -> dict[str, Any]:
    """Counts of a matrix's weights before and after, in 64 equal bins."""
    row = next(row for row in prepared.plan.rows if row.target.name == name)
    part = len(prepared.model.block_names) if row.block is None else row.block
    stored = _stored(row, load_file(folder.partial / folder.records[part]["shard"]))
    after = row.format.decode(*row.format.unpack(stored, row.target.shape))
    before = prepared.checkpoint.tensors([row.key])[row.key].float()
    low, high = (float(end) for end in torch.aminmax(before))
    counts = [torch.histc(w.clamp(low, high), 64, low, high).int().tolist() for w in (before, after)]
    return {"name": name, "low": low, "high": high, "before": counts[0], "after": counts[1]}
