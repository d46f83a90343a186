"""The command line: one verb, one call."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from llmquant.errors import LlmquantError, PlanError, VerificationError

EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 wrong command line; 3 the model cannot be read; 4 the plan cannot be "
    "carried out; 5 the output folder cannot be used; 6 calibration or evaluation text cannot be used; 7 verification "
    "failed; 8 done, but numbers went wrong in places, and the summary says what was done about it; 130 interrupted."
)
app = typer.Typer(
    help="Quantize the weights of a large language model, load it, and measure what was lost.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()
notes = Console(stderr=True)
INTERRUPTED = 130
RECOVERED = 8

ModelArgument = Annotated[str, typer.Argument(help="A folder with config.json and safetensors, or a hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
TextOption = Annotated[
    str, typer.Option(help="Text to measure on: a text, JSON, JSONL or parquet file, or a dataset id.")
]


def main() -> None:
    """Run the command line; known failures end in one line and their exit code."""
    try:
        app(standalone_mode=True)
    except LlmquantError as error:
        notes.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def _progress_bar(quiet: bool) -> Iterator[Any]:
    """A bar with the time left, as a callback (what, done, total); a new total begins a new bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, disable=quiet) as bar:
        tasks: dict[int, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if total not in tasks:
                tasks[total] = bar.add_task(what, total=total)
            bar.update(tasks[total], description=what, completed=done)

        yield report


# ---- quantize


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write [MODEL-FORMAT].")] = None,
    bits: Annotated[int, typer.Option(help="Bits of an integer weight, 2 to 8.")] = 4,
    group: Annotated[str, typer.Option(help="Columns that share a scale; or channel, or tensor.")] = "128",
    asym: Annotated[bool, typer.Option("--asym/--sym", help="With a zero point, or without.")] = False,
    format: Annotated[str | None, typer.Option(help="A format by name instead, such as int4:g128:asym.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="JSON rules instead: what gets which format.")] = None,
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
        str, typer.Option(help="Fold random rotations into the weights: none, value (of heads), residual (these too).")
    ] = "none",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (the model's own samples), a text, JSON, JSONL or parquet file, a dataset id, or token ids: a "
            ".safetensors with an int64 tensor named tokens, (windows, length) [self]."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows [128; with fast 16].")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a window [512, or the model's limit].")] = None,
    batch: Annotated[int, typer.Option(help="Windows that go through a block at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same bytes.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [cuda where there is one].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type to calibrate in: float32, bfloat16, float16 [its own].")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--eval", help="Measure perplexity and KL on this text at the end.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result or cut run.")] = False,
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

    from llmquant import pipeline
    from llmquant.recipe import QUALITIES, Recipe

    logging.disable_progress_bar()  # there is one of our own

    if quality not in QUALITIES:
        raise PlanError(f"quality {quality!r} is unknown: choose one of {', '.join(QUALITIES)}")
    granularity = f"g{group}" if group.isdecimal() else group
    spec = format or f"int{bits}:{granularity}" + (":asym" if asym else "")
    rules = Recipe.read(recipe) if recipe else Recipe.uniform(spec, skip=tuple(skip or ()), clip=clip, solver=solver)
    preset = QUALITIES[quality]
    shown = None
    if preset.calibrated or calibration is not None:
        windows = samples or (128 if preset.calibrated else 16)
        shown = pipeline.Calibration(calibration or "self", windows, length, batch, curvature=preset.curvature)
    folder = output or Path(f"{Path(model).name}-{recipe.stem if recipe else spec.replace(':', '-')}")
    job = pipeline.Job(
        model,
        rules.with_options(preset.options),
        shown,
        seed,
        device or _default_device(),
        _dtype(dtype),
        tuning=preset.tuning,
        trust_remote_code=trust_remote_code,
        rotate=rotate,
    )
    torch.manual_seed(seed)
    with _progress_bar(as_json) as progress:
        prepared = pipeline.prepare(
            job,
            folder,
            overwrite=overwrite,
            offload=offload_activations,
            max_memory=_bytes(max_memory),
            progress=progress,
        )
    if text and not prepared.model.causal:
        raise PlanError(f"{model}: --eval measures causal language models only, and this is none")
    if dry_run:
        _print_plan(prepared.plan, as_json)
        return
    # Before the work, so that a text that cannot be used is not found out after it.
    evaluation = text and _evaluation_windows(model, text, "documents", None, None, trust_remote_code)
    start = time.monotonic()
    try:
        with _progress_bar(as_json) as progress:
            manifest = pipeline.quantize(prepared, folder, overwrite=overwrite, verify=not no_verify, progress=progress)
    except KeyboardInterrupt:
        notes.print(f"interrupted: what is done is kept in {folder}.partial; repeat the same command to resume")
        raise
    summary = _summary(manifest, folder, time.monotonic() - start)
    if evaluation:
        summary["evaluation"] = _measure(str(folder), model, *evaluation, "float32", trust_remote_code)
    _print_summary(summary, manifest, as_json)
    if manifest["recoveries"]:
        raise typer.Exit(RECOVERED)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _bytes(size: str | None) -> int | None:
    """A number of bytes, with a unit or without."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", size.strip(), re.ASCII)
    if found is None or len(size) > 20:
        raise PlanError(f"--max-memory {size!r}: give bytes, as 4GiB, 500MB or 4000000000")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


def _dtype(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return None
    if name not in known:
        raise PlanError(f"dtype {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]


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
        f"\nsize {_size(plan.bytes_before)} -> {_size(plan.bytes_after)} "
        f"({plan.bytes_before / plan.bytes_after:.2f}x), {plan.bits_per_weight:.3f} bits per quantized weight\n"
        f"peak memory about {_size(plan.peak_memory)}{states}, disk {_size(plan.bytes_after)}, "
        f"time about {_duration(plan.seconds)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_alike(what: str, found: list[tuple[str, str]]) -> None:
    """(name, reason), a line for all names that differ in their numbers only."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in found:
        alike.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    for (pattern, reason), names in alike.items():
        name = names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them)"
        out.print(f"{what}: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)


def _summary(manifest: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    facts = {key: manifest[key] for key in ("bits_per_weight", "bytes_before", "bytes_after", "kept_dense")}
    summary = {"output": str(folder), "seconds": round(seconds, 2), **facts}
    summary |= {key: manifest[key] for key in ("recoveries", "experts") if manifest.get(key)}
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
    if decisions := _decisions(manifest):
        out.print(f"steps kept: {decisions}", highlight=False, soft_wrap=True)
    if scaled := manifest["scaled"]:
        out.print(f"scales moved in {len(scaled)} places", highlight=False)
    if tuning := manifest.get("tuning"):
        first, least = tuning["divergences"][0][1], min(kl for _, kl in tuning["divergences"])
        verdict = "kept" if tuning["kept"] else "not kept"
        out.print(f"tuning {verdict}: KL on held-out tokens {first:.4g} -> {least:.4g}", highlight=False)
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
        f"\n{summary['output']}: {_size(before)} -> {_size(after)} ({before / after:.2f}x), "
        f"{summary['bits_per_weight']:.3f} bits per quantized weight, {_duration(summary['seconds'])}",
        highlight=False,
        soft_wrap=True,
    )
    if found := summary.get("verification"):
        out.print(f"{_verified(found)}, {found['seconds']:.1f} s", highlight=False, soft_wrap=True)
    if "evaluation" in summary:
        _print_divergence(summary["evaluation"])


def _verified(found: dict[str, Any]) -> str:
    """What a verification says of outputs and logits, in a line."""
    if "unchecked" in found:
        return f"verified: {found['unchecked']}"
    return (
        f"verified on {found['tokens']} tokens: KL {found['kl_mean']:.4f}, the same likeliest token for "
        f"{found['top1_agreement']:.1%}; outputs of {found['worst_block']} off by {found['worst_error']:.4f} "
        f"(bound {found['worst_bound']:.4f})"
    )


def _decisions(manifest: dict[str, Any]) -> str:
    """How many matrices kept each step of their solver, of those that took it."""
    taken: dict[str, list[bool]] = {}
    for tensor in manifest["tensors"]:
        for step in tensor.get("steps", []):
            taken.setdefault(step["name"], []).append(step["kept"])
    return ", ".join(f"{name} {sum(kept)} of {len(kept)}" for name, kept in taken.items())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# ---- eval


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: TextOption,
    reference: Annotated[str | None, typer.Option(help="The unquantized model: adds KL divergence.")] = None,
    protocol: Annotated[
        str, typer.Option(help="documents: a BOS before each; gptq: joined by blank lines.")
    ] = "documents",
    window: Annotated[int | None, typer.Option(help="Tokens a window [2048, or the model's limit].")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure on the first windows only.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the activations.")] = "float32",
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity of MODEL on a text and, with --reference, how far its predictions moved (KL divergence, in nats)."""
    prepared = _evaluation_windows(model, text, protocol, window, max_windows, trust_remote_code)
    found = _measure(model, reference, *prepared, dtype, trust_remote_code)
    if as_json:
        print(json.dumps(found))
    else:
        _print_divergence(found)


def _evaluation_windows(
    model: str, source: str, protocol: str, window: int | None, max_windows: int | None, trust_remote_code: bool
) -> tuple[Any, int]:
    """Tokens (windows, length) of a text, and how large the vocabulary really is."""
    from transformers import AutoConfig

    from llmquant import text
    from llmquant.checkpoint import Checkpoint, locate

    folder = Checkpoint(locate(model)).folder
    tokenizer = text.load_tokenizer(folder, trust_remote_code)
    stream = text.token_stream(tokenizer, text.read_documents(source, tokenizer), protocol=protocol)
    length = text.window_length(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), window)
    return text.windows(stream, length)[:max_windows], text.vocabulary_size(tokenizer)


def _measure(
    model: str, reference: str | None, windows: Any, vocabulary: int, dtype: str, trust_remote_code: bool
) -> dict[str, Any]:
    from llmquant import metrics

    loaded = _load(model, dtype, trust_remote_code)
    with _progress_bar(False) as progress:
        report = partial(progress, "evaluate")
        if reference is None:
            return metrics.perplexity(loaded, windows, vocabulary=vocabulary, progress=report).to_dict()
        original = _load(reference, dtype, trust_remote_code)
        return metrics.divergence(original, loaded, windows, vocabulary=vocabulary, progress=report).to_dict()


def _load(model: str, dtype: str, trust_remote_code: bool) -> Any:
    import transformers

    import llmquant.hf  # noqa: F401  (registers the loader)
    from llmquant.checkpoint import Checkpoint, locate
    from llmquant.matrices import loader_of

    transformers.utils.logging.disable_progress_bar()
    folder = locate(model)
    loaded = loader_of(Checkpoint(folder).config()).from_pretrained(
        folder, dtype=_dtype(dtype), trust_remote_code=trust_remote_code
    )
    return loaded.to(_default_device()).eval()


def _print_divergence(found: dict[str, Any]) -> None:
    table = Table("measure", "value", box=None, show_header=False)
    flat = {key: value for key, value in found.items() if not isinstance(value, dict)}
    flat |= {f"{side}_perplexity": found[side]["perplexity"] for side in ("model", "reference") if side in found}
    for key, value in flat.items():
        if isinstance(value, int | float):
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.5g}")
    out.print(table)


# ---- inspect, formats


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize wrote.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and decode every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a quantized folder holds; --verify checks that it is still what was written."""
    from llmquant import inspection

    facts = inspection.manifest(folder)
    if verify:
        with _progress_bar(as_json) as progress:
            problems = inspection.verify(folder, progress)
        if problems:
            more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
            raise VerificationError(f"{folder}: {problems[0]}{more}: copy or quantize it again")
    if as_json:
        print(json.dumps({**facts, **({"verified": True} if verify else {})}))
        return
    table = Table("tensor", "shape", "format", "bits/weight", "error", "output error", box=None)
    for tensor in facts["tensors"]:
        table.add_row(
            tensor["name"],
            "x".join(map(str, tensor["shape"])),
            tensor["format"],
            f"{tensor['bits_per_weight']:.3f}",
            f"{tensor['error']:.4f}",
            f"{tensor['output_error']:.4f}" if "output_error" in tensor else "-",
        )
    out.print(table)
    for note in facts.get("scaled", []):
        rule = f"{note['rule']} {note['alpha']:.2f}" if "alpha" in note else note["rule"]
        readers = ", ".join(name.removeprefix(f"{note['source'].rpartition('.')[0]}.") for name in note["readers"])
        out.print(f"scaled: {note['source']} for {readers}: {rule}", highlight=False, markup=False, soft_wrap=True)
    before, after = facts["bytes_before"], facts["bytes_after"]
    out.print(
        f"\n{facts['model']}: {_size(before)} -> {_size(after)}, "
        f"{facts['bits_per_weight']:.3f} bits per quantized weight"
        + (f"; {len(facts['files'])} files and {len(facts['tensors'])} tensors verified" if verify else ""),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that quantize wrote.")],
    reference: Annotated[str, typer.Option(help="The model it was made of.")],
    text: Annotated[str | None, typer.Option(help="Text to show to both [random tokens].")] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of it.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 128,
    max_kl: Annotated[float, typer.Option(help="Nats a token, at most.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [cuda where there is one].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [the reference's own].")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare FOLDER with the model it was made of, block by block; neither is in memory as a whole.

    Hashes every file, then compares weights, outputs of blocks and, at the end, predictions. A difference that the
    format does not explain, or a KL divergence above --max-kl, ends with exit code 7.
    """
    from llmquant import inspection, rotation, verification
    from llmquant.checkpoint import Checkpoint, locate

    facts = inspection.manifest(folder)
    settings = facts.get("settings", {})
    _, original = rotation.opened(
        Checkpoint(locate(reference)),
        settings.get("rotate", "none"),
        settings.get("seed", 0),
        device=device or _default_device(),
        dtype=_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    if text is None:
        shown = verification.random_windows(original, windows, length, seed)
    else:
        shown, _ = _evaluation_windows(reference, text, "documents", length, windows, trust_remote_code)
    with _progress_bar(as_json) as progress:
        if problems := inspection.verify(folder, progress):
            raise VerificationError(f"{folder}: {problems[0]}: copy or quantize it again")
        found = verification.verify(
            folder,
            original,
            shown,
            manifest=facts,
            max_kl=max_kl,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print_verification(found, as_json)
    found.check(folder, "quantize it again, or compare it with the model that it was made of")


def _print_verification(found: Any, as_json: bool) -> None:
    facts = {**found.to_json(), "problems": list(found.problems), "seconds": round(found.seconds, 2)}
    if as_json:
        print(json.dumps(facts))
        return
    headers = ("block", "matrices", "weights\noff by", "outputs\noff by", "\nat most", "with those\nbefore")
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None)
    for block in facts["blocks"]:
        figures = [block[key] for key in ("weights", "error", "bound", "drift")]
        shown = ["-" if figure is None else f"{figure:.4f}" for figure in figures]
        table.add_row(block["name"] or "outside", str(block["matrices"]), *shown)
    out.print(table)
    out.print(f"\n{_verified(facts)}, {found.seconds:.1f} s", highlight=False, soft_wrap=True)


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


if __name__ == "__main__":
    main()
