"""The story of a run: for each block, calibrate, solve, save, verify, advance."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmquant import allocate, domain, equivalence, rotation, trial, verification
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams, summed_windows
from llmquant.card import turned
from llmquant.checkpoint import Checkpoint, locate
from llmquant.curvature import curvature
from llmquant.endtoend import keep_lean, tune_all
from llmquant.equivalence import Place
from llmquant.errors import OutputError, PlanError
from llmquant.estimate import Work
from llmquant.finishing import compare, result_config, result_manifest
from llmquant.job import Calibration, Job, Prepared, Progress, loading, silent
from llmquant.output import ALLOCATION, CALIBRATION, CURVATURE, OutputFolder, check_usable
from llmquant.phases import phase, timed
from llmquant.plan import Plan, make_plan, with_recipe
from llmquant.ranks import SINGLE, Parcel, Ranks, join
from llmquant.recipe import Recipe
from llmquant.saving import restore, save_block
from llmquant.scaling import Scales
from llmquant.shown import mended_windows, window_length
from llmquant.skeleton import fast_dtype, read_config, stored_dtype
from llmquant.solvers import TUNERS
from llmquant.solving import solve_block, solve_outside
from llmquant.swap import WeightSwap

# Of a run without calibration whose formats are chosen.
SHOWN = Calibration(samples=16, curvature=1.0)
RECIPE = "recipe.json"  # the rules that were chosen, in the result
AT_ONCE = 2**25  # bytes of what enters the widest matrix of a block, in float32
SCALED = ("awq", "gptq")  # solvers before which scales are moved

__all__ = ["Calibration", "Job", "Prepared", "Progress", "prepare", "quantize", "silent"]


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
    ranks = join(job.device)
    if ranks.first:
        check_usable(output, overwrite=overwrite)
    if offload is not None and not offload.is_dir():
        raise OutputError(f"{offload}: no such folder: make it, or name another with --offload-activations")
    turning = partial(progress, "rotate")
    base = Checkpoint(locate(job.model))
    if job.dtype is None and job.calibration is not None:
        own = stored_dtype(base, read_config(base, job.trust_remote_code, decoded=False))
        job = replace(job, dtype=fast_dtype(job.device, own))
    chosen = None
    if job.rotate == rotation.AUTO:
        chosen = ranks.alone(partial(_rotation, job, base, output, progress)).facts
    job = job if chosen is None else replace(job, rotate=chosen["chosen"])
    checkpoint, model = rotation.opened(base, job.rotate, job.seed, dtype=job.dtype, progress=turning, **loading(job))
    calibration = job.calibration
    length = 0
    if calibration is not None and not model.causal:
        raise PlanError(
            f"{job.model}: {type(model.model).__name__} is no causal language model, and calibration shows text to "
            "those only: use --quality fast, which reads weights only"
        )
    if (shown := _seen(job)) is not None and model.causal:
        length = ranks.alone(lambda: Parcel(window_length(model.config, shown))).facts
        job = _few_at_once(job, model, length)
    work, budget = _work(job, length, offload, ranks), job.budget
    recipe = job.recipe if budget is None else allocate.provisional(job.recipe, budget, model)
    plan = make_plan(checkpoint, model, recipe, output if ranks.first else None, work, max_memory)
    if budget is not None:
        sampled = 0 if calibration else SHOWN.samples * length
        plan = allocate.planned(plan, checkpoint, model, job.recipe, budget, max_memory, sampled)
    ranks.agree(_decisive(job, checkpoint, plan))
    if chosen is not None:
        plan = replace(plan, notes=(*plan.notes, f"rotation: {turned(chosen)}"))
    return Prepared(job, checkpoint, model, plan, length, chosen, offload, ranks)


def _decisive(job: Job, checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What must be the same for all processes for their results to be."""
    return {
        **{key: value for key, value in job.settings(checkpoint).items() if key != "source"},
        "the plan": plan.modules(),
        "the bytes of the model": plan.bytes_before,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "the processor": torch.backends.cpu.get_cpu_capability(),
    }


def _rotation(job: Job, base: Checkpoint, output: Path, progress: Progress) -> Parcel:
    """Which rotation, and why: by a trial of each, but where scales are moved, which holds outliers and costs less.

    Measured with `balanced`: eval/results/rotations.json.
    """
    calibrated = job.calibration is not None
    rules = job.recipe.settled(calibrated).rules
    if any(rule.solver in SCALED for rule in rules if rule.format is not None):
        return Parcel({"chosen": "none", "reason": "scales are moved instead, which holds outliers and costs less"})
    found: dict[str, float] = {}
    refused: dict[str, str] = {}
    for mode in rotation.MODES:
        step = partial(progress, f"try rotation {mode}")
        try:
            checkpoint, model = rotation.opened(base, mode, job.seed, dtype=job.dtype, **loading(job))
        except PlanError as error:
            if mode == "none":
                raise
            refused[mode] = str(error)
            continue
        if not model.causal:
            return Parcel({"chosen": "none", "reason": f"{type(model.model).__name__} is no causal language model"})
        rows = make_plan(checkpoint, model, job.recipe, output, Work(tokens=int(calibrated))).rows
        windows = verification.random_windows(model, trial.WINDOWS, trial.LENGTH, job.seed)
        found[mode] = trial.divergence(model, rows, windows, len(windows), step)
    return Parcel(trial.decide(found) | ({"refused": refused} if refused else {}))


def _seen(job: Job) -> Calibration | None:
    """What is shown to the model: for calibration or, where there is none, to see what formats cost."""
    return SHOWN if job.calibration is None and job.budget is not None else job.calibration


def _few_at_once(job: Job, model: StreamedModel, length: int) -> Job:
    """On a CPU, where many rows at once are no faster than some hundreds, with no more windows than AT_ONCE allows.

    Where something is trained a batch is a step, whatever it takes.
    """
    calibration, rules = job.calibration, job.recipe.rules
    trained = job.tuning or any(rule.solver in TUNERS for rule in rules)
    if calibration is None or trained or model.device.type != "cpu":
        return job
    widest = max((target.shape[1] for target in model.targets(0).values()), default=1)
    batch = max(1, min(calibration.batch, AT_ONCE // (4 * widest * length)))
    return replace(job, calibration=replace(calibration, batch=batch))


def _work(job: Job, length: int, offload: Path | None, ranks: Ranks) -> Work:
    calibration = job.calibration
    if calibration is None:
        return Work()
    return Work(
        tokens=calibration.samples * length,
        batch=min(calibration.batch, calibration.samples) * length,
        curvature=calibration.curvature,
        sampled=calibration.source == "self",
        checked=min(domain.TOKENS, calibration.samples * length) if calibration.checked else 0,
        tuning=job.tuning,
        offload=offload is not None,
        ranks=ranks.count,
    )


@torch.no_grad()
def quantize(
    prepared: Prepared, output: Path, *, overwrite: bool = False, verify: bool = True, progress: Progress = silent
) -> dict[str, Any]:
    """Carry out the plan, or what is left of it from a run that was cut. Returns the manifest.

    verify: read the result back and compare it with the original (see verification.py) before it gets its name. Raises
    VerificationError where they are further apart than the format explains. In what is returned, but not in the file,
    are "phases", seconds by what was done, and "behind", those of the writing that went on beside it.

    A KeyboardInterrupt leaves OUTPUT.partial, which the same call takes up again.
    Of several processes the first has the folder; all return when it is done.
    """
    settings = prepared.job.settings(prepared.checkpoint)
    settings["codes_tuned"] = prepared.plan.tuning is not None and prepared.plan.tuning.shifts
    if not prepared.ranks.first:
        return _quantize(prepared, None, verify, silent)
    with OutputFolder(output, settings, overwrite=overwrite) as folder:
        return _quantize(prepared, folder, verify, progress)


def _quantize(prepared: Prepared, folder: OutputFolder | None, verify: bool, progress: Progress) -> dict[str, Any]:
    ranks, blocks = prepared.ranks, len(prepared.model.block_names)
    with timed() as seconds:
        prepared, allocation = _allocated(prepared, folder, progress)
        solved = set(ranks.alone(lambda: Parcel(list(folder.records) if folder else [])).facts)
        streams, curves = _calibrate(prepared, folder, progress)
        places = _places(prepared)
        for block in range(blocks):
            if block not in solved or streams is not None:
                _do_block(prepared, folder, block, block in solved, streams, curves, places, progress)
        if blocks not in solved:
            results = solve_outside(prepared, streams)
            if folder is not None:
                folder.later(partial(save_block, prepared, folder, None, results))
        wanted = streams.gathered() if streams is not None and prepared.job.tuning else None
        ended = ranks.alone(partial(_finish, prepared, folder, streams, wanted, allocation, verify, progress))
    return ended.facts | {"phases": dict(seconds), "behind": 0.0 if folder is None else folder.behind}


def _finish(
    prepared: Prepared,
    folder: OutputFolder | None,
    streams: Streams | None,
    wanted: list[Tensor] | None,
    allocation: dict[str, Any] | None,
    verify: bool,
    progress: Progress,
) -> Parcel:
    """What the first process does when all blocks are solved: the manifest. wanted: what leaves the last one in the
    reference, for tuning.
    """
    assert folder is not None
    plan = prepared.plan
    folder.settle()
    tuning: dict[str, Any] = {}
    if streams is not None and wanted is not None:
        with phase("tune", whole=True):
            tuning = tune_all(prepared, folder, streams, wanted, progress)
    progress("finish", plan.weights, plan.weights)
    with phase("finish", whole=True):
        folder.assemble(result_config(prepared), prepared.checkpoint.companions())
        manifest = {**result_manifest(prepared, folder), **tuning}
        if allocation:
            folder.write_json(RECIPE, allocation["recipe"])
            manifest["allocation"] = allocation
    timeless: dict[str, Any] = {}
    if verify:
        with phase("verify", whole=True):
            remedy = "please report it, or repeat the command with --no-verify"
            found = compare(prepared, folder, manifest, progress, remedy)
        timeless = {"verification": found.to_json() | {"seconds": found.seconds}}
    with phase("finish", whole=True):
        folder.finish(manifest)
    return Parcel(manifest | timeless)


def _do_block(
    prepared: Prepared,
    folder: OutputFolder | None,
    block: int,
    solved: bool,
    streams: Streams | None,
    curves: dict[str, Tensor],
    places: Iterator[list[Place]],
    progress: Progress,
) -> None:
    """Solve a block, or take what an earlier run left of it; have it written; advance the streams.

    solved: whether an earlier run did. What was read of the block, and what was solved, is let go of at the end, but
    for what is still being written.
    """
    job, model, plan = prepared.job, prepared.model, prepared.plan
    blocks = len(model.block_names)
    step = partial(_progress_within, progress, f"block {block + 1} of {blocks}", _done(plan, block), plan.weights)
    step(0)
    if block + 1 < blocks:
        prepared.checkpoint.prefetch(model.block_keys(block + 1))
    with phase("scales", whole=True):
        own_places = next(places)
    with phase("load"):
        model.load_block(block)
    swap = WeightSwap()
    if solved:
        restore(prepared, folder, block, swap)
    else:
        scales = None if streams is None else Scales(streams, block, swap, own_places)
        results = solve_block(prepared, block, streams, curves, swap, scales, step)
        if folder is not None:
            keep_lean(folder, block, results)
            changed, noted = (None, None) if scales is None else (scales.stored(), scales.to_json())
            folder.later(partial(save_block, prepared, folder, block, results, changed=changed, noted=noted))
    if streams is not None and (block + 1 < blocks or job.tuning or plan.of_block(None)):
        streams.advance(block, swap)
    with phase("load"):
        model.unload_block(block)


def _done(plan: Plan, block: int) -> int:
    """Weights before a block."""
    return sum(row.weights for row in plan.rows if row.block is not None and row.block < block)


def _progress_within(progress: Progress, what: str, before: int, total: int, done: int) -> None:
    progress(what, before + done, total)


# ---- formats


def _allocated(
    prepared: Prepared, folder: OutputFolder | None, progress: Progress
) -> tuple[Prepared, dict[str, Any] | None]:
    """With the formats that a budget allows, and how they were chosen, by the first process; as it was where there is
    none.
    """
    job, shown = prepared.job, _seen(prepared.job)
    if job.budget is None or shown is None:
        return prepared, None
    seen = shown if shown.curvature else replace(shown, curvature=1.0)

    alone = replace(prepared, ranks=SINGLE)

    def make() -> dict[str, Any]:
        windows = _kept_windows(alone, seen, folder, progress)
        curves = partial(_kept_curvature, alone, windows, seen, folder, progress)
        return allocate.allocate(alone, windows, seen.batch, curves, progress)

    def chosen() -> Parcel:
        assert folder is not None
        with phase("choose", whole=True):
            return Parcel(folder.kept_json(ALLOCATION, make))

    found: dict[str, Any] = prepared.ranks.alone(chosen).facts
    recipe, calibrated = Recipe.from_json(found["recipe"]), job.calibration is not None
    plan = with_recipe(prepared.plan, prepared.checkpoint, prepared.model, recipe, calibrated)
    return replace(prepared, plan=plan), found


# ---- calibration


def _calibrate(
    prepared: Prepared, folder: OutputFolder | None, progress: Progress
) -> tuple[Streams | None, dict[str, Tensor]]:
    """The streams that enter the first block, and the curvature where it is wanted."""
    calibration, ranks = prepared.job.calibration, prepared.ranks
    if calibration is None:
        return None, {}
    windows = _kept_windows(prepared, calibration, folder, progress)
    place = _spill(prepared, folder) if prepared.plan.offload else None
    streams = Streams.start(prepared.model, windows, calibration.batch, partial(progress, "embed"), place, ranks)
    if not calibration.curvature:
        return streams, {}
    return streams, _kept_curvature(prepared, windows, calibration, folder, progress)


def _kept_windows(
    prepared: Prepared, calibration: Calibration, folder: OutputFolder | None, progress: Progress
) -> Tensor:
    def shown() -> Parcel:
        assert folder is not None
        return Parcel(None, folder.kept(CALIBRATION, lambda: mended_windows(prepared, calibration, progress)))

    return prepared.ranks.alone(shown).tensors["tokens"].cpu()


def _kept_curvature(
    prepared: Prepared, windows: Tensor, calibration: Calibration, folder: OutputFolder | None, progress: Progress
) -> dict[str, Tensor]:
    """All processes find it together, and the first one keeps it."""

    def kept() -> Parcel:
        known = folder is not None and folder.keeps(CURVATURE)
        return Parcel(known, folder.kept(CURVATURE, dict) if folder is not None and known else {})

    if (found := prepared.ranks.alone(kept)).facts:
        return found.tensors
    curves = _curvature(prepared, windows, calibration, _spill(prepared, folder), progress)
    return curves if folder is None else folder.kept(CURVATURE, lambda: curves)


def _spill(prepared: Prepared, folder: OutputFolder | None) -> Path:
    """Where hidden states lie, if not in memory."""
    return prepared.offload or (Path(tempfile.gettempdir()) if folder is None else folder.partial)


@phase("curvature", whole=True)
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
            ranks=prepared.ranks,
            progress=partial(progress, "curvature"),
        )
    except PlanError as error:
        logging.getLogger(__name__).warning("%s: rounding goes on without the curvature of the loss", error)
        return {}
    return {name: part.blocks for name, part in found.items()}


def _places(prepared: Prepared) -> Iterator[list[Place]]:
    """Of block after block, where scales can be moved, if a solver wants it; float32 shows it."""
    if prepared.job.calibration is None or not any(row.rule.solver in SCALED for row in prepared.plan.rows):
        yield from repeat([])
    checkpoint, found = prepared.checkpoint, iter(list[list[Place]]())
    if prepared.ranks.first:
        model = StreamedModel(checkpoint, dtype=torch.float32, untied=checkpoint.untied, **loading(prepared.job))
        found = equivalence.find_all(model)

    def find() -> Parcel:
        places = next(found)
        facts = [(place.source, place.readers, place.offset) for place in places]
        return Parcel(facts, {str(number): place.rows for number, place in enumerate(places)})

    for _ in prepared.model.block_names:
        told = prepared.ranks.alone(find)
        yield [
            Place(source, tuple(readers), told.tensors[str(number)], offset)
            for number, (source, readers, offset) in enumerate(told.facts)
        ]
