"""Commands that train: qat, and tune for folders that are finished."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmquant.card import learned, tuned
from llmquant.cli_common import (
    DeviceOption,
    FolderArgument,
    JsonOption,
    LengthOption,
    ModelArgument,
    OverwriteOption,
    SeedOption,
    TrustOption,
    bytes_named,
    dtype_named,
    duration,
    notes,
    out,
    print_lines,
    progress_bar,
    size,
)


def qat(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            help="What to train on: a text, JSON, JSONL or parquet file, a dataset id, token ids as a .safetensors, "
            "or self, the model's own samples."
        ),
    ],
    format: Annotated[str | None, typer.Option(help="A format by name, such as int2:g64 or ternary:g128.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON rules instead: what gets which format.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [MODEL-FORMAT-qat].")] = None,
    steps: Annotated[int, typer.Option(help="Updates of all that is trained.")] = 300,
    samples: Annotated[int, typer.Option(help="Windows of text; an eighth of them is held out.")] = 1024,
    length: LengthOption = None,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Pieces that a batch is cut into, one after the other.")] = 1,
    rate: Annotated[float, typer.Option(help="Of weights, in steps of their grid an update.")] = 2e-2,
    other_rate: Annotated[float, typer.Option(help="Of scales, zero points, norms and biases.")] = 1e-3,
    cross_entropy: Annotated[
        float, typer.Option(help="What the cross-entropy of the text weighs, beside KL from the original.")
    ] = 0.0,
    rounding: Annotated[str, typer.Option(help="While training: nearest, stochastic or floor.")] = "nearest",
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="Type to compute in: float32, bfloat16, float16 [its own].")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Refuse a plan that needs more, as 4GiB.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train MODEL while it computes with weights as the format will store them, and write the quantized folder.

    The loss is the KL divergence from the original's predictions. A run that was cut is taken up again by the same
    command.
    """
    from llmquant import api
    from llmquant import qat as training
    from llmquant.description import describe
    from llmquant.errors import PlanError
    from llmquant.job import Calibration, Job
    from llmquant.recipe import Recipe

    if (format is None) == (recipe is None):
        raise PlanError("give either --format or --recipe")
    rules = Recipe.read(recipe) if recipe else Recipe.uniform(str(format), solver="rtn")
    name = recipe.stem if recipe else str(format).replace(":", "-")
    folder = output or Path(f"{Path(model).name}-{name}-qat")
    job = Job(
        model,
        rules.starting_from("rtn"),
        Calibration(data, samples, length, batch, curvature=0.0),
        seed,
        device or api.default_device(),
        dtype_named(dtype),
        trust_remote_code=trust_remote_code,
    )
    course = training.Course(steps, batch, accumulate, rate, other_rate, cross_entropy, rounding)
    prepared = training.prepare(job, course, folder, overwrite=overwrite, max_memory=bytes_named(max_memory))
    start = time.monotonic()
    try:
        with progress_bar(as_json) as progress:
            manifest = training.train(prepared, course, folder, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        notes.print(f"interrupted: what is done is kept in {folder}.partial; repeat the same command to resume")
        raise
    describe(folder)
    _print(folder, manifest, "qat", time.monotonic() - start, as_json)


def tune(
    folder: FolderArgument,
    reference: Annotated[str, typer.Option(help="The model it was made of.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [FOLDER-tuned].")] = None,
    calibration: Annotated[
        str, typer.Option(help="Text to tune on, as for quantize; self: the original's own samples.")
    ] = "self",
    samples: Annotated[int, typer.Option(help="Windows of it; an eighth of them is held out.")] = 128,
    length: LengthOption = None,
    steps: Annotated[int, typer.Option(help="Updates of all that is trained.")] = 150,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    codes: Annotated[bool, typer.Option("--codes", help="Train the rounding, too.")] = False,
    top_k: Annotated[
        int | None,
        typer.Option(help="Likeliest tokens of the original to tune towards; 0: all [64 if memory is short]."),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to compute in: float32, bfloat16, float16 [the reference's own].")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Refuse a plan that needs more, as 4GiB.")] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train scales, norms and biases of a quantized FOLDER towards the predictions of the model it was made of.

    Codes and formats stay. What is no better on windows held out is not kept, and the new folder then holds what the
    old one does. A run that was cut is taken up again by the same command.
    """
    from llmquant import api, folder_tuning
    from llmquant.description import describe
    from llmquant.job import Calibration

    written = output or folder.with_name(f"{folder.name}-tuned")
    prepared, course = folder_tuning.prepare(
        folder,
        reference,
        Calibration(calibration, samples, length, batch, curvature=0.0),
        written,
        steps=steps,
        codes=codes,
        top=top_k,
        seed=seed,
        device=device or api.default_device(),
        dtype=dtype_named(dtype),
        overwrite=overwrite,
        max_memory=bytes_named(max_memory),
        trust_remote_code=trust_remote_code,
    )
    start = time.monotonic()
    try:
        with progress_bar(as_json) as progress:
            manifest = folder_tuning.tune_folder(
                folder, prepared, course, written, seed=seed, overwrite=overwrite, progress=progress
            )
    except KeyboardInterrupt:
        notes.print(f"interrupted: what is done is kept in {written}.partial; repeat the same command to resume")
        raise
    if "recipe" in manifest["settings"]:  # a folder that was converted has no command to make it again
        describe(written)
    _print(written, manifest, "tuning", time.monotonic() - start, as_json)


def _print(folder: Path, manifest: dict[str, Any], what: str, seconds: float, as_json: bool) -> None:
    facts = {key: manifest[key] for key in ("bits_per_weight", "bytes_before", "bytes_after", what)}
    if as_json:
        print(json.dumps({"output": str(folder), "seconds": round(seconds, 2), **facts}))
        return
    fixed = {tensor["format"] for tensor in manifest["tensors"] if "asym" in tensor["format"].split(":")}
    if what == "tuning" and fixed:
        print_lines([f"zero points of {', '.join(sorted(fixed))} stay as they are: they are integers"])
    before, after = manifest["bytes_before"], manifest["bytes_after"]
    out.print(
        f"{tuned(manifest[what]) if what == 'tuning' else learned(manifest[what])}\n"
        f"{folder}: {size(before)} -> {size(after)} ({before / after:.2f}x), "
        f"{manifest['bits_per_weight']:.3f} bits per quantized weight, {duration(seconds)}",
        highlight=False,
        soft_wrap=True,
    )


COMMANDS = (qat, tune)
