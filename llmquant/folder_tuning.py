"""End-to-end tuning of a finished folder, towards the model it was made of.

Codes stay as they are unless asked for; scales, zero points that are real numbers, norms and biases are trained towards
the original's predictions (see tune.py). What was found is written to a folder of its own, in the same formats; where
nothing was better on windows held out, the new folder holds the old one's values, and says so.

Neither model is in memory as a whole: the original passes once, block by block, and of what it predicts its last hidden
states or likeliest tokens are kept (see teacher.py); the folder's matrices are there as codes, a byte a weight, and
every block is decoded when it runs, and again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmquant import finishing, inspection, pipeline, tune, verification
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.checkpoint import Checkpoint
from llmquant.errors import PlanError, VerificationError
from llmquant.estimate import BASE, Row
from llmquant.job import Calibration, Job, Prepared, Progress, silent
from llmquant.metrics import quantized_modules
from llmquant.output import TEACHER, OutputFolder
from llmquant.recipe import Recipe, Rule
from llmquant.saving import matrices, part_of, save_block
from llmquant.shown import kept_windows
from llmquant.solvers import Solution
from llmquant.solving import Result, report_of
from llmquant.stats import energy
from llmquant.teacher import CHUNK_BYTES, All, Likeliest, Teacher, last_states, likeliest

TOP = 64  # likeliest tokens that are kept where hidden states are too large


@dataclass(frozen=True)
class Course:
    """How is tuned. codes: rounding is trained, too; top: likeliest tokens of the original that are kept, 0: all, from
    its last hidden states.
    """

    steps: int = 150
    codes: bool = False
    top: int = 0

    @property
    def rates(self) -> tune.Rates:
        return tune.Rates() if self.codes else tune.Rates(shift=0.0)


def prepare(
    folder: Path,
    reference: str,
    calibration: Calibration,
    output: Path,
    *,
    steps: int = 150,
    codes: bool = False,
    top: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Prepared, Course]:
    """Everything that can be checked before the work. top None: as memory allows. Raises the LlmquantError to show."""
    facts = inspection.manifest(folder)
    if steps < 1 or (top is not None and top < 0):
        raise PlanError(f"{steps} steps towards the {top} likeliest tokens: at least 1 step, and 0 for all tokens")
    modules = quantized_modules(Checkpoint(folder).config(), folder)
    settings = facts.get("settings", {})
    rotate = settings.get("rotate", "none")
    job = Job(
        reference,
        Recipe(tuple(Rule(name, fmt.spec, "rtn") for name, fmt in modules.items())),
        calibration,
        seed if rotate == "none" else settings["seed"],  # of the rotations
        device,
        dtype,
        trust_remote_code=trust_remote_code,
        rotate=rotate,
    )
    prepared = pipeline.prepare(job, output, overwrite=overwrite)
    total = psutil.virtual_memory().total if max_memory is None else max_memory
    if top is None:  # by all the memory there is, not what is free: the same machine comes to the same result
        hidden = prepared.model.config.get_text_config().hidden_size
        states = calibration.samples * prepared.length * hidden * prepared.model.dtype.itemsize
        top = 0 if states < total / 4 else TOP
    course = Course(steps, codes, top)
    need, room = memory(prepared, course), psutil.virtual_memory().available if max_memory is None else max_memory
    if need > room:
        raise PlanError(
            f"tuning needs about {need:,} bytes of memory, and there are {room:,}: take fewer or shorter windows, "
            "fewer at once with --batch, or leave codes as they are"
        )
    return prepared, course


def memory(prepared: Prepared, course: Course) -> int:
    """Bytes at the peak: codes, one block decoded with its gradients, and what is kept of the original."""
    model, rows, calibration = prepared.model, prepared.plan.rows, prepared.job.calibration
    assert calibration is not None
    text, itemsize, blocks = model.config.get_text_config(), model.dtype.itemsize, len(model.block_names)
    weights, features = sum(row.weights for row in rows), sum(sum(row.target.shape) for row in rows)
    outside = sum(prepared.checkpoint.nbytes(name) for name in model.outside_keys())
    shown, tokens = calibration.samples * prepared.length, calibration.batch * prepared.length
    kept = shown * (8 * course.top if course.top else text.hidden_size * itemsize)
    passing = tokens * (2 * features // blocks + text.hidden_size * blocks) * itemsize
    trained = weights * (1 + (6 * 4 if course.codes else 0)) + 2 * weights // blocks * (4 + itemsize)
    return BASE + 2 * outside + trained + kept + passing + 4 * CHUNK_BYTES


@torch.no_grad()
def tune_folder(
    folder: Path,
    prepared: Prepared,
    course: Course,
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Tune, or go on with a run that was cut, and write the new folder. Returns the manifest."""
    if problems := inspection.verify(folder):
        raise VerificationError(f"{folder}: {problems[0]}: copy or quantize it again")
    facts, source, job, model = inspection.manifest(folder), Checkpoint(folder), prepared.job, prepared.model
    calibration = job.calibration
    assert calibration is not None
    noted = {**asdict(course), "seed": seed, "calibration": asdict(calibration)}
    settings = {**job.settings(prepared.checkpoint), "tune": noted, "folder": source.fingerprint()}
    with OutputFolder(output, settings, overwrite=overwrite) as written:
        windows = kept_windows(prepared, written, progress)
        tuned = _tuned(prepared, course, source, written, windows, seed, progress)
        found = {matrix.target.name: matrix for matrix in tuned.matrices}
        keys = model.vectors()
        vectors = {keys[name]: vector.cpu() for name, vector in tuned.vectors.items()} if tuned.kept else {}
        before = {tensor["name"]: tensor for tensor in facts["tensors"]}
        moved = {name for note in facts.get("scaled", []) for name in (note["source"], *note["readers"])}
        for block in model.places:
            if part_of(model, block) in written.records:
                continue
            with model.loaded(block):
                results = [
                    _result(model, row, found[row.target.name], before[row.target.name], row.target.name in moved)
                    for row in prepared.plan.of_block(block)
                ]
            own = model.outside_keys() if block is None else model.block_keys(block)
            dense = source.tensors([name for name in own if name in source.names()])
            save_block(prepared, written, block, results, changed=dense | vectors)
        written.assemble(finishing.result_config(prepared), source.companions())
        manifest = finishing.result_manifest(prepared, written)
        inherited = ("kept_dense", "recoveries", "experts", "scaled", "qat", "calibration_fit")
        manifest |= {key: facts[key] for key in inherited if key in facts}
        tuning = {"kept": tuned.kept, "divergences": tuned.divergences, "codes": course.codes}
        manifest["settings"] = {**facts.get("settings", {}), "tune": {**noted, "kept": tuned.kept}}
        manifest["tuning"] = tuning if tuned.kept else facts.get("tuning", tuning)
        finishing.compare(prepared, written, manifest, progress)
        written.finish(manifest)
    return manifest


def _tuned(
    prepared: Prepared,
    course: Course,
    source: Checkpoint,
    written: OutputFolder,
    windows: Tensor,
    seed: int,
    progress: Progress,
) -> tune.Tuned:
    model, job, calibration = prepared.model, prepared.job, prepared.job.calibration
    assert calibration is not None
    place = written.partial if prepared.plan.offload else None
    streams = Streams.start(model, windows, calibration.batch, partial(progress, "embed"), place)
    teacher = _teacher(model, streams, windows, course, written, progress)
    decoded = verification.Decoded(source.folder, model)
    twin = StreamedModel(
        decoded,
        device=job.device,
        dtype=model.dtype,
        trust_remote_code=job.trust_remote_code,
        decoded=True,
        untied=prepared.checkpoint.untied,
    )
    quantized: list[tune.Matrix] = []
    with ExitStack() as held:
        for block in twin.places:
            held.enter_context(twin.loaded(block))
            rows = prepared.plan.of_block(block)
            names = dict.fromkeys(name for row in rows for name in row.pieces)  # experts have theirs together
            quantized += matrices(prepared, block, source.tensors(list(names)))
            if block is not None:
                for row in rows:
                    _drop(twin, row)
        tuned = tune.tune(
            twin,
            quantized,
            {name: source.dtype(key) for name, key in twin.vectors().items()},
            windows,
            teacher,
            streams.held_windows(),
            steps=course.steps,
            batch=calibration.batch,
            seed=seed,
            rates=course.rates,
            recompute=True,
            begun=written.state(),
            look=lambda state: written.keep_state(int(state["step"]), state),
            progress=partial(progress, "tune"),
        )
    model.unload_outside()
    return tuned


def _teacher(
    model: StreamedModel,
    streams: Streams,
    windows: Tensor,
    course: Course,
    written: OutputFolder,
    progress: Callable[[str, int, int], None],
) -> Teacher:
    """What the original predicts; what lies outside its blocks stays loaded where that is needed for it."""

    def passed() -> list[Tensor]:
        return last_states(streams, partial(progress, "original"))

    if not course.top:
        hidden = passed()
        model.load_outside()
        return All(model, windows, hidden)

    def reduced() -> dict[str, Tensor]:
        hidden = passed()
        with model.loaded(None):
            return likeliest(model, windows, hidden, course.top)

    return Likeliest(**written.kept(TEACHER, reduced))


def _drop(twin: StreamedModel, row: Row) -> None:
    """The decoded matrix goes: what is trained stands for it."""
    leaf = row.target.parameter.rpartition(".")[2]
    module = twin.module(row.target)
    empty = torch.empty_like(module.get_parameter(leaf), device="meta")
    module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


def _result(model: StreamedModel, row: Row, matrix: tune.Matrix, before: dict[str, Any], moved: bool) -> Result:
    """moved: scales were moved between matrices, and the original weight is no measure: what was noted stays."""
    facts: dict[str, Any] = {key: before[key] for key in ("solver", "steps", "tokens", "recoveries") if key in before}
    w = row.target.matrix(model.module(row.target)).float()
    solution = Solution(matrix.codes, matrix.grid, energy(row.format.decode(matrix.codes, matrix.grid).sub_(w)))
    found = {**report_of(row, w, solution, None, None), **facts, "tuned": True}
    if moved:
        found |= {key: before[key] for key in ("error", "loss") if key in before}
    return Result(row, solution, found)
