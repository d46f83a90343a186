"""Quantization-aware training: weights are trained while the model computes with them as their formats will store them.

The master weights stay in full precision to the end (see fake_quantize.py); scales, zero points, norms and biases are
trained along. The loss is KL(original || model) of the next token's distribution, to which the cross-entropy of the
text can be added; the original is the same model with its own tensors, so it takes no memory of its own. Embeddings and
head stay as they are. The model of the least divergence on windows held out is written, as an ordinary folder, which
must then predict what was trained.

accelerate runs the loop. Trainer would too, but it and accelerate's own checkpoints hold Adam's state as pickles, and
nothing here reads any: the state is kept as safetensors beside the shards under way, and a cut run goes on from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from llmquant import finishing, pipeline, verification
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.errors import PlanError, VerificationError
from llmquant.estimate import BASE, Row, device_memory
from llmquant.fake_quantize import ROUNDINGS, FakeQuantized
from llmquant.job import Job, Prepared, Progress, silent
from llmquant.output import OutputFolder
from llmquant.saving import part_of, save_block
from llmquant.shown import kept_windows
from llmquant.solvers import Solution
from llmquant.solving import Result, report_of
from llmquant.stats import energy
from llmquant.teacher import CHUNK_BYTES, All, Pupil, last_states
from llmquant.trained import Moved, Training, batches, in_place

STATE_BYTES = 5 * 4  # of a weight: shift, gradient, two moments of Adam, the best: float32
CLIPPED = 1.0  # norm of the gradients
SAME = 1e-3  # of the logits' norm, by which those of the folder may differ: sums in another order


@dataclass(frozen=True)
class Course:
    """How is trained. batch: windows a step, in `accumulate` pieces, one after the other; rates: Adam's, per step, of
    weights in steps of their grid, and of all else; cross_entropy: what that of the text weighs beside KL = 1;
    looks: steps from one look at the held-out windows to the next, at which the state is kept, too.
    """

    steps: int = 300
    batch: int = 8
    accumulate: int = 1
    rate: float = 2e-2
    other_rate: float = 1e-3
    cross_entropy: float = 0.0
    rounding: str = "nearest"
    looks: int = 50

    @property
    def piece(self) -> int:
        """Windows that are in memory at once."""
        return self.batch // self.accumulate

    def check(self) -> None:
        """Raises PlanError for what cannot be."""
        if self.steps < 1 or self.batch < 1 or self.looks < 1:
            raise PlanError(
                f"{self.steps} steps of {self.batch} windows, a look every {self.looks}: at least 1 of each"
            )
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise PlanError(f"a batch of {self.batch} windows cannot be cut into {self.accumulate} equal pieces")
        if self.rounding not in ROUNDINGS:
            raise PlanError(f"rounding {self.rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}")
        if not (self.rate > 0 and self.other_rate >= 0 and self.cross_entropy >= 0):
            raise PlanError("rates and weights of losses are positive numbers")


def prepare(
    job: Job, course: Course, output: Path, *, overwrite: bool = False, max_memory: int | None = None
) -> Prepared:
    """Everything that can be checked before the work. Raises the LlmquantError that says what is wrong."""
    course.check()
    if job.calibration is None or job.rotate != "none" or job.tuning:
        raise PlanError("training needs text, and neither rotates a model nor tunes it otherwise")
    prepared = pipeline.prepare(job, output, overwrite=overwrite)
    need = memory(prepared, course, recompute=True)
    room = device_memory(prepared.model.device)[0] if max_memory is None else max_memory
    if need > room:
        raise PlanError(
            f"training needs about {need:,} bytes of memory, and there are {room:,}: cut a batch into more pieces with "
            "--accumulate, take shorter windows, or tune a quantized folder instead, which keeps a byte a weight"
        )
    return prepared


def memory(prepared: Prepared, course: Course, *, recompute: bool) -> int:
    """Bytes at the peak. recompute: every block is run again on the way back."""
    model, rows = prepared.model, prepared.plan.rows
    weights, itemsize = sum(row.weights for row in rows), model.dtype.itemsize
    outside = sum(prepared.checkpoint.nbytes(name) for name in model.outside_keys())
    tokens = course.piece * prepared.length
    text = model.config.get_text_config()
    blocks, features = len(model.block_names), sum(sum(row.target.shape) for row in rows)
    passing = tokens * (2 * features // (blocks if recompute else 1) + text.hidden_size * blocks) * itemsize
    logits = 6 * min(4 * tokens * text.vocab_size, CHUNK_BYTES)
    return BASE + outside + weights * (STATE_BYTES + 2 * itemsize) + passing + logits


@torch.no_grad()
def train(
    prepared: Prepared, course: Course, output: Path, *, overwrite: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Train, or go on with a run that was cut, and write the folder. Returns the manifest.

    Raises VerificationError where the folder does not predict what the trained model does.
    """
    job, model, calibration = prepared.job, prepared.model, prepared.job.calibration
    assert calibration is not None
    settings = {**job.settings(prepared.checkpoint), "qat": asdict(course)}
    with OutputFolder(output, settings, overwrite=overwrite) as folder:
        windows = kept_windows(prepared, folder, progress)
        place = (prepared.offload or folder.partial) if prepared.plan.offload else None
        streams = Streams.start(model, windows, calibration.batch, partial(progress, "embed"), place)
        last_states(streams, partial(progress, "original"))
        shown = windows[-verification.WINDOWS :, : verification.LENGTH].to(model.device)
        with model.whole():
            weights, moved = _trained_parts(prepared, course)
            training = _train(prepared, course, folder, streams, weights, moved, partial(progress, "train"))
            with in_place(model.model, list(weights.values()), moved), _nearest(weights):
                expected = model.model(input_ids=shown, use_cache=False).logits
            _write(prepared, folder, weights, moved)
            del weights, moved
        folder.assemble(finishing.result_config(prepared), prepared.checkpoint.companions())
        _check_same(folder.partial, prepared, shown, expected)
        manifest = finishing.result_manifest(prepared, folder)
        manifest["qat"] = {**asdict(course), "divergences": training.divergences}
        finishing.compare(prepared, folder, manifest, progress)
        folder.finish(manifest)
    return manifest


def _write(
    prepared: Prepared, folder: OutputFolder, weights: dict[str, FakeQuantized], moved: dict[str, Moved]
) -> None:
    model, vectors = prepared.model, prepared.model.vectors()
    changed = {vectors[name]: part.vector().cpu() for name, part in moved.items()}
    for block in model.places:
        if part_of(model, block) not in folder.records:
            results = [_result(model, row, weights[row.target.name]) for row in prepared.plan.of_block(block)]
            save_block(prepared, folder, block, results, changed=changed)


def _trained_parts(prepared: Prepared, course: Course) -> tuple[dict[str, FakeQuantized], dict[str, Moved]]:
    """What is trained, by name in memory: matrices on the grids of rounding to nearest, and vectors."""
    model, weights = prepared.model, {}
    for row in prepared.plan.rows:
        w = row.target.matrix(model.module(row.target)).float()
        grid = row.format.fit(w, clip=row.rule.options.get("clip", "search"))
        part = FakeQuantized(row.target, row.format, grid, model.dtype, course.rounding)
        weights[row.target.name] = part
    types = {name: prepared.checkpoint.dtype(key) for name, key in model.vectors().items()}
    return weights, {name: Moved(model.model.get_parameter(name), dtype) for name, dtype in types.items()}


def _train(
    prepared: Prepared,
    course: Course,
    folder: OutputFolder,
    streams: Streams,
    weights: dict[str, FakeQuantized],
    moved: dict[str, Moved],
    progress: Any,
) -> Training:
    model, seed = prepared.model, prepared.job.seed
    others = [part.drift for part in weights.values() if part.drift is not None]
    others += [*(part.stretch for part in weights.values()), *(part.delta for part in moved.values())]
    groups = ([part.shift for part in weights.values()], course.rate), (others, course.other_rate)
    training = Training(groups, course.steps)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu",
        mixed_precision="no",  # the model has its type, and what is trained is float32
        gradient_accumulation_steps=course.accumulate,
        device_placement=False,
    )
    if accelerator.num_processes > 1:
        raise PlanError(f"training runs in one process, and {accelerator.num_processes} were started: start one")
    windows = torch.cat(streams.tokens)
    taught = All(model, windows, [states for part in streams.reference for states in part])
    # By all the memory there is, not what is free: it changes no number, but how long a step takes.
    recompute = memory(prepared, course, recompute=False) > psutil.virtual_memory().total / 2
    pupil = Pupil(model, windows, taught, course.piece, recompute=recompute, truth=course.cross_entropy)
    pupil, optimizer = accelerator.prepare(pupil, training.optimizer)
    held = streams.held_windows()
    trained, judged = torch.where(~held)[0], torch.where(held)[0]
    begun = folder.state()
    first = 0 if begun is None else training.restore(begun)

    def look(step: int) -> None:
        with _nearest(weights):
            training.judge(step, pupil.divergence(judged))
        folder.keep_state(step, training.tensors(step))

    with in_place(model.model, list(weights.values()), moved):
        for step, chosen in enumerate(batches(trained, course.batch, course.steps, seed)):
            if step < first:
                continue
            if step % course.looks == 0 and (step > first or begun is None):
                look(step)
            training.pace(step)
            torch.manual_seed(seed * 2**32 + step)  # of stochastic rounding, in a run that is taken up too
            for piece in chosen.split(course.piece):
                with accelerator.accumulate(pupil), torch.enable_grad():
                    accelerator.backward(pupil(piece))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(training.parameters, CLIPPED)
                    optimizer.step()
                    optimizer.zero_grad()
            progress(step + 1, course.steps)
        if first < course.steps:
            look(course.steps)
    training.take_best()
    return training


@contextmanager
def _nearest(weights: dict[str, FakeQuantized]) -> Iterator[None]:
    """Rounding to the nearest, which is what the file will hold."""
    roundings = {name: part.rounding for name, part in weights.items()}
    for part in weights.values():
        part.rounding = "nearest"
    try:
        yield
    finally:
        for name, part in weights.items():
            part.rounding = roundings[name]


def _result(model: StreamedModel, row: Row, part: FakeQuantized) -> Result:
    """As a result, with its distance from the original weight, which was not what it was trained for."""
    codes, grid = part.solution(model.module(row.target).get_parameter(row.target.parameter.rpartition(".")[2]))
    w = row.target.matrix(model.module(row.target)).float()
    solution = Solution(codes, grid, energy(row.format.decode(codes, grid).sub_(w)))
    return Result(row, solution, {**report_of(row, w, solution, None, None), "solver": "qat"})


def _check_same(folder: Path, prepared: Prepared, shown: Tensor, expected: Tensor) -> None:
    """What the folder's tensors predict must be what the trained model did."""
    decoded = verification.Decoded(folder, prepared.model)
    job, dtype = prepared.job, prepared.model.dtype
    twin = StreamedModel(decoded, device=job.device, dtype=dtype, trust_remote_code=job.trust_remote_code, decoded=True)
    with twin.whole():
        for block in range(len(twin.block_names)):
            decoded.fill(twin, block)
        found = twin.model(input_ids=shown, use_cache=False).logits
    off = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not off <= SAME:
        raise VerificationError(
            f"{folder}: its logits differ from those of the trained model by {off:.2e} of their norm: please report it"
        )
