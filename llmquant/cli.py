"""The command line: one verb, one call. What reads finished folders is in cli_check.py and cli_exchange.py; what
trains, in cli_train.py."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from llmquant import cli_bench, cli_check, cli_exchange, cli_train
from llmquant.card import alike, allocated, fitted, tuned, turned, verified
from llmquant.cli_budget import budget_of, short
from llmquant.cli_check import print_divergence
from llmquant.cli_common import (
    DeviceOption,
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
    speaks,
)
from llmquant.errors import LlmquantError, PlanError
from llmquant.phases import overhead

EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong command line; 3 the model cannot be read; 4 the plan cannot be "
    "carried out; 5 the output folder cannot be used; 6 calibration or evaluation text cannot be used; 7 verification "
    "failed; 8 done, but numbers went wrong in places, and the summary says what was done about it; 9 another process "
    "of the same job is gone; 130 interrupted."
)
app = typer.Typer(
    help="Quantize the weights of a large language model, load it, and measure what was lost.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130
RECOVERED = 8


def main() -> None:
    """Run the command line; known failures end in one line and their exit code."""
    try:
        app(standalone_mode=True)
    except LlmquantError as error:
        if speaks(str(error)):
            notes.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


# ---- quantize


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [MODEL-FORMAT].")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of an integer weight, 2 to 8 [4].")] = None,
    group: Annotated[str | None, typer.Option(help="Columns that share a scale; or channel, or tensor [128].")] = None,
    asym: Annotated[bool, typer.Option("--asym/--sym", help="With a zero point, or without.")] = False,
    format: Annotated[str | None, typer.Option(help="A format by name instead, such as int4:g128:asym.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON rules instead: what gets which format.")] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Choose a format for every matrix instead: bits a weight, all counted.")
    ] = None,
    target_size: Annotated[str | None, typer.Option(help="The same, for all weights of the result, as 5GB.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="The same, for the smallest size with this KL, in nats.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Formats to choose from [int2:g64,int3:g64,...,int6:g64,int8:g128].")
    ] = None,
    sensitivity: Annotated[
        str, typer.Option(help="How it is found out what a format costs a matrix: kl, fisher, hessian [by size].")
    ] = "auto",
    skip: Annotated[
        list[str] | None, typer.Option(help="Modules to keep dense, such as *.down_proj. Repeatable.")
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="balanced; fast: weights alone, or the cheap steps where --calibration is given; best: also trains "
            "scales and rounding end to end, for what memory and time allow."
        ),
    ] = "balanced",
    solver: Annotated[
        str, typer.Option(help="Method by name instead: rtn, awq, gptq, gptaq, hqq, kmeans, adaround, autoround.")
    ] = "auto",
    clip: Annotated[
        str | None, typer.Option(help="Range rule: search, minmax, percentile, mse or kl [the solver's own].")
    ] = None,
    rotate: Annotated[
        str,
        typer.Option(
            help="Fold random rotations into the weights: none, value (of heads), residual (these too), or auto: the "
            "best in a trial."
        ),
    ] = "none",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (the model's own samples), a text, JSON, JSONL or parquet file, a dataset id, or token ids: a "
            ".safetensors with an int64 tensor named tokens, (windows, length) [self]."
        ),
    ] = None,
    no_calibration_check: Annotated[
        bool,
        typer.Option(
            "--no-calibration-check",
            help="Take text as it is, also where it is not of the kind that the model was made for; half of it is the "
            "model's own samples then, otherwise.",
        ),
    ] = False,
    samples: Annotated[int | None, typer.Option(help="Calibration windows [128; with fast 16].")] = None,
    length: LengthOption = None,
    batch: Annotated[int, typer.Option(help="Windows that go through a block at once; a CPU may take fewer.")] = 8,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type to calibrate in: float32, bfloat16, float16 [its own; float32 on a CPU that is slow in that]."
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--eval", help="Measure perplexity and KL on this text at the end.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Export the result, too: compressed-tensors, gptq, gguf or dense.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: OverwriteOption = False,
    offload_activations: Annotated[
        Path | None, typer.Option(help="Folder for the hidden states of calibration [memory, if they fit].")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse a plan that needs more, as 4GiB; pages of files do not count.")
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare the result with the original at the end.")
    ] = False,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Quantize MODEL into a folder that transformers' from_pretrained loads after `import llmquant`.

    A run that was cut is taken up again by the same command.
    """
    import torch
    from transformers.utils import logging

    from llmquant import api, pipeline, ranks
    from llmquant.allocate import assignments
    from llmquant.description import describe
    from llmquant.exchange.export import check, export
    from llmquant.exchange.model import Matrix, Model
    from llmquant.output import check_usable
    from llmquant.recipe import Recipe

    logging.disable_progress_bar()  # there is one of our own

    budget = budget_of(target_bpw, target_size, max_kl, formats, sensitivity)
    if budget is not None and (named := [bits, group, format, asym or None]) != [None] * len(named):
        raise PlanError("a format beside a budget, which chooses one for every matrix: give candidates with --formats")
    group = group or "128"
    granularity = f"g{group}" if group.isdecimal() else group
    spec = budget.formats[0] if budget else format or f"int{bits or 4}:{granularity}" + (":asym" if asym else "")
    rules = Recipe.read(recipe) if recipe else Recipe.uniform(spec, skip=tuple(skip or ()), clip=clip, solver=solver)
    named_by = recipe.stem if recipe else short(budget) if budget else spec.replace(":", "-")
    folder = output or Path(f"{Path(model).name}-{named_by}")
    job = api.job_for(
        model,
        rules,
        quality=quality,
        calibration=calibration,
        calibration_check=not no_calibration_check,
        samples=samples,
        length=length,
        batch=batch,
        seed=seed,
        device=device,
        dtype=dtype_named(dtype),
        rotate=rotate,
        budget=budget,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar(as_json or not speaks()) as progress:
        prepared = pipeline.prepare(
            job,
            folder,
            overwrite=overwrite,
            offload=offload_activations,
            max_memory=bytes_named(max_memory),
            progress=progress,
        )
    first = prepared.ranks.first
    if text and not prepared.model.causal:
        raise PlanError(f"{model}: --eval measures causal language models only, and this is none")
    exported = folder.with_name(f"{folder.name}-{to}")
    if to is not None:
        for rows in assignments(prepared):
            matrices = tuple(Matrix(row.target, row.key, row.format) for row in rows)
            check(Model(prepared.checkpoint, prepared.checkpoint.config(), prepared.model.model, matrices), to)
        if first:
            check_usable(exported, overwrite=overwrite)
    if dry_run:
        if first:
            _print_plan(prepared.plan, as_json)
        return
    # Before the work, so that a text that cannot be used is not found out after it.
    evaluation = first and text and api.evaluation_windows(model, text, "documents", None, None, trust_remote_code)
    start = time.monotonic()
    try:
        with progress_bar(as_json or not first) as progress:
            manifest = pipeline.quantize(prepared, folder, overwrite=overwrite, verify=not no_verify, progress=progress)
    except KeyboardInterrupt:
        if first:
            notes.print(f"interrupted: what is done is kept in {folder}.partial; repeat the same command to resume")
        raise
    ranks.leave()
    if not first:
        return
    summary = _summary(manifest, folder, time.monotonic() - start)
    if to is not None:
        said = export(folder, exported, to, overwrite=overwrite)
        summary["export"] = {"output": str(exported), "to": to, "notes": said}
    if evaluation:
        with progress_bar(False) as progress:
            report = partial(progress, "evaluate")
            measured = api.measure(str(folder), model, *evaluation, torch.float32, trust_remote_code, report)
        summary["evaluation"] = measured
    describe(folder, summary.get("evaluation"))
    _print_summary(summary, manifest, as_json)
    if manifest["recoveries"]:
        raise typer.Exit(RECOVERED)


def _print_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_json()))
        return
    table = Table("tensor", "shape", "format", "bits/weight", "kernel on CPU", box=None)
    for name, group in groupby(plan.rows, key=lambda row: row.target.listed):
        row, *others = group
        shape = "x".join(map(str, [*([len(others) + 1] if row.target.expert is not None else []), *row.target.shape]))
        bits = row.format.bits_per_weight(row.target.shape)
        table.add_row(name, shape, row.format.spec, f"{bits:.3f}", row.kernel)
    out.print(table)
    _print_alike("kept dense", [(kept.name, kept.reason) for kept in plan.kept])
    for note in plan.notes:
        out.print(note, highlight=False, markup=False, soft_wrap=True)
    if plan.tuning is not None:
        trained = "codes, scales and norms" if plan.tuning.shifts else "scales and norms, as memory does for no more"
        out.print(f"tuning of all blocks together: {trained}", highlight=False)
    states = " with hidden states on disk" if plan.offload else ""
    out.print(
        f"\nsize {size(plan.bytes_before)} -> {size(plan.bytes_after)} "
        f"({plan.bytes_before / plan.bytes_after:.2f}x), {plan.bits_per_weight:.3f} bits per quantized weight\n"
        f"peak memory about {size(plan.peak_memory)}{states}, disk {size(plan.bytes_after)}, "
        f"time about {duration(plan.seconds)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_alike(what: str, found: list[tuple[str, str]]) -> None:
    print_lines([f"{what}: {name}: {reason}" for name, reason in alike(found)])


def _summary(manifest: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    facts = {key: manifest[key] for key in ("bits_per_weight", "bytes_before", "bytes_after", "kept_dense")}
    summary = {"output": str(folder), "seconds": round(seconds, 2), **facts}
    noted = ("recoveries", "experts", "allocation", "calibration_fit", "rotation")
    summary |= {key: manifest[key] for key in noted if manifest.get(key)}
    summary |= {"phases": manifest["phases"], "overhead": overhead(manifest["phases"]), "behind": manifest["behind"]}
    if "verification" in manifest:
        summary["verification"] = {key: value for key, value in manifest["verification"].items() if key != "blocks"}
    return summary


def _print_summary(summary: dict[str, Any], manifest: dict[str, Any], as_json: bool) -> None:
    measure = "output_error" if any("output_error" in tensor for tensor in manifest["tensors"]) else "error"
    worst = sorted(manifest["tensors"], key=lambda tensor: -tensor.get(measure, 0.0))[:5]
    if as_json:
        print(json.dumps({**summary, "worst": [{"name": t["name"], measure: t.get(measure)} for t in worst]}))
        return
    table = Table("worst tensors", "format", f"relative {measure.replace('_', ' ')}", box=None)
    for tensor in worst:
        table.add_row(tensor["name"], tensor["format"], f"{tensor.get(measure, 0.0):.4f}")
    out.print(table)
    if allocation := manifest.get("allocation"):
        print_lines([f"formats chosen {allocated(allocation)}"])
    if decisions := _decisions(manifest):
        out.print(f"steps kept: {decisions}", highlight=False, soft_wrap=True)
    if fit := manifest.get("calibration_fit"):
        out.print(f"calibration text: {fitted(fit)}", highlight=False, soft_wrap=True)
    if rotation := manifest.get("rotation"):
        out.print(f"rotation: {turned(rotation)}", highlight=False, soft_wrap=True)
    if scaled := manifest["scaled"]:
        out.print(f"scales moved in {len(scaled)} places", highlight=False)
    if tuning := manifest.get("tuning"):
        out.print(f"tuning {tuned(tuning)}", highlight=False)
    _print_alike("kept dense", [(kept["name"], kept["reason"]) for kept in manifest["kept_dense"]])
    _print_alike("recovered", [(found["name"], found["what"]) for found in manifest["recoveries"]])
    if experts := manifest.get("experts"):
        out.print(
            f"experts: {experts['matrices']} matrices saw {experts['least_tokens']} to {experts['most_tokens']} tokens "
            f"each, half of them {experts['median_tokens']} or more; {experts['blended']} borrowed from the others of "
            f"their layer, {experts['unreached']} of which saw none",
            highlight=False,
            soft_wrap=True,
        )
    before, after = summary["bytes_before"], summary["bytes_after"]
    out.print(
        f"\n{summary['output']}: {size(before)} -> {size(after)} ({before / after:.2f}x), "
        f"{summary['bits_per_weight']:.3f} bits per quantized weight, {duration(summary['seconds'])}",
        highlight=False,
        soft_wrap=True,
    )
    print_lines([_spent(summary)])
    if found := summary.get("verification"):
        out.print(f"verified: {verified(found)}, {found['seconds']:.1f} s", highlight=False, soft_wrap=True)
    if "export" in summary:
        exported = summary["export"]
        print_lines([*exported["notes"], f"exported and verified: {exported['output']}"])
    if "evaluation" in summary:
        print_divergence(summary["evaluation"])


def _spent(summary: dict[str, Any]) -> str:
    """Where the time went, of what took 1 % of it or more."""
    total = sum(summary["phases"].values())
    parts = sorted(summary["phases"].items(), key=lambda part: -part[1])
    named = [f"{name} {seconds / total:.0%}" for name, seconds in parts if seconds >= 0.01 * total]
    return f"time: {', '.join(named)}; written beside it: {duration(summary['behind'])}"


def _decisions(manifest: dict[str, Any]) -> str:
    """How many matrices kept each step of their solver, of those that took it."""
    taken: dict[str, list[bool]] = {}
    for tensor in manifest["tensors"]:
        for step in tensor.get("steps", []):
            taken.setdefault(step["name"], []).append(step["kept"])
    return ", ".join(f"{name} {sum(kept)} of {len(kept)}" for name, kept in taken.items())


# ---- formats


@app.command()
def formats(as_json: JsonOption = False) -> None:
    """List the formats: bits per weight, signal-to-noise ratio on random weights, kernels, who reads the files."""
    from llmquant import format_table

    rows = sorted(format_table.measure(), key=lambda row: row.bits_per_weight)
    if as_json:
        print(json.dumps([row.to_json() for row in rows]))
        return
    shapes = [f"bits at\n{out_features // 1024}k x {columns // 1024}k" for out_features, columns in format_table.SHAPES]
    headers = ["\nformat", *shapes, "SQNR\nnormal", "dB\nt5", "CPU kernel\n(bfloat16)", "\nread by"]
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        bits = [f"{value:.3f}" for value in row.bits_per_weight]
        table.add_row(row.format, *bits, f"{row.normal:.1f}", f"{row.student_t5:.1f}", row.kernel, row.readers)
    out.print(table)
    out.print(FORMAT_OPTIONS, highlight=False, soft_wrap=True)


FORMAT_OPTIONS = """
SQNR: signal to noise of normal and of Student-t weights (5 degrees), without calibration. Options follow the name after
colons, in any order; scale types are fp16, bf16 and fp32, by default that of the model:

  int2 .. int8             g<columns> | channel | tensor; sym_full | sym | sym_gptq | asym | asym_float; scale type
  mxfp4, mxfp6_..., ...    mse | floor | rceil | even: how a block's exponent is found
  vsq3 .. vsq8             s4 | s5 | s6: bits of a vector's scale; scale type (of the row)
  fp8_e4m3, fp8_e5m2       channel | tensor | block | g<columns>; scale type, fp32 if left out
  nf4                      g<columns> | channel | tensor; scale type, or dq: double quantization
  table:-1,-0.4,0,0.3,1    levels of your own; g<columns> | channel | tensor; scale type
  kmeans1 .. kmeans8       channel | tensor | g<columns>; scale type
  ternary                  g<columns> | channel | tensor; opt | twn | absmean; scale type
  binary                   g<columns> | channel | tensor; scale type
  nvfp4, mx4, mx6, mx9     none"""

app.command("eval")(cli_check.evaluate)
for command in (*cli_check.COMMANDS, *cli_exchange.COMMANDS, *cli_train.COMMANDS, cli_bench.bench):
    app.command()(command)


if __name__ == "__main__":
    main()
