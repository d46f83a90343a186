"""Commands that train: qat, and tune for folders that are finished."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmquant.card import learned
from llmquant.cli_common import (
    JsonOption,
    ModelArgument,
    TrustOption,
    bytes_named,
    dtype_named,
    duration,
    notes,
    out,
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
    length: Annotated[int | None, typer.Option(help="Tokens a window [512, or the model's limit].")] = None,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Pieces that a batch is cut into, one after the other.")] = 1,
    rate: Annotated[float, typer.Option(help="Of weights, in steps of their grid an update.")] = 2e-2,
    other_rate: Annotated[float, typer.Option(help="Of scales, zero points, norms and biases.")] = 1e-3,
    cross_entropy: Annotated[
        float, typer.Option(help="What the cross-entropy of the text weighs, beside KL from the original.")
    ] = 0.0,
    rounding: Annotated[str, typer.Option(help="While training: nearest, stochastic or floor.")] = "nearest",
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same bytes.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [cuda where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type to compute in: float32, bfloat16, float16 [its own].")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Refuse a plan that needs more, as 4GiB.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result or cut run.")] = False,
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


def _print(folder: Path, manifest: dict[str, Any], what: str, seconds: float, as_json: bool) -> None:
    facts = {key: manifest[key] for key in ("bits_per_weight", "bytes_before", "bytes_after", what)}
    if as_json:
        print(json.dumps({"output": str(folder), "seconds": round(seconds, 2), **facts}))
        return
    before, after = manifest["bytes_before"], manifest["bytes_after"]
    out.print(
        f"{learned(manifest[what])}\n{folder}: {size(before)} -> {size(after)} ({before / after:.2f}x), "
        f"{manifest['bits_per_weight']:.3f} bits per quantized weight, {duration(seconds)}",
        highlight=False,
        soft_wrap=True,
    )


COMMANDS = (qat,)
