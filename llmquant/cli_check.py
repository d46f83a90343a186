"""Commands that say what a model is worth: eval, inspect, verify."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from llmquant.card import alike, verified
from llmquant.cli_common import (
    DeviceOption,
    FolderArgument,
    JsonOption,
    MaxWindowsOption,
    ModelArgument,
    TextOption,
    TrustOption,
    WindowOption,
    dtype_named,
    out,
    print_lines,
    progress_bar,
    size,
)
from llmquant.errors import VerificationError


def evaluate(
    model: ModelArgument,
    text: TextOption,
    reference: Annotated[str | None, typer.Option(help="The unquantized model: adds KL divergence.")] = None,
    protocol: Annotated[
        str, typer.Option(help="documents: a BOS before each; gptq: joined by blank lines.")
    ] = "documents",
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    dtype: Annotated[str, typer.Option(help="Type of the activations.")] = "float32",
    activations: Annotated[
        str | None,
        typer.Option(
            help="Round the inputs of quantized layers: int8:dynamic, by token, or int8:static with :minmax, "
            ":percentile, :mse or :kl."
        ),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Text on which a static range is found.")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity of MODEL on a text and, with --reference, how far its predictions moved (KL divergence, in nats)."""
    from llmquant import api

    rounding = api.rounded_activations(model, activations, calibration, trust_remote_code)
    windows = api.evaluation_windows(model, text, protocol, window, max_windows, trust_remote_code)
    with progress_bar(False) as progress:
        report = partial(progress, "evaluate")
        found = api.measure(model, reference, *windows, dtype_named(dtype), trust_remote_code, report, rounding)
    if as_json:
        print(json.dumps(found))
    else:
        print_divergence(found)


def print_divergence(found: dict[str, Any]) -> None:
    table = Table("measure", "value", box=None, show_header=False)
    flat = {key: value for key, value in found.items() if not isinstance(value, dict)}
    flat |= {f"{side}_perplexity": found[side]["perplexity"] for side in ("model", "reference") if side in found}
    for key, value in flat.items():
        if isinstance(value, int | float):
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.5g}")
    out.print(table)


def inspect(
    folder: FolderArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file and decode every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a quantized folder holds, and what multiplies by it; --verify checks that it is still as written."""
    import torch

    from llmquant import inspection

    facts = inspection.manifest(folder)
    if verify:
        with progress_bar(as_json) as progress:
            problems = inspection.verify(folder, progress)
        if problems:
            more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
            raise VerificationError(f"{folder}: {problems[0]}{more}: copy or quantize it again")
    kernels = inspection.kernels(folder, facts, "cuda" if torch.cuda.is_available() else "cpu")
    if as_json:
        served = {name: {"kernel": kernel, "refused": refused} for name, (kernel, refused) in kernels.items()}
        print(json.dumps({**facts, "kernels": served, **({"verified": True} if verify else {})}))
        return
    table = Table("tensor", "shape", "format", "bits/weight", "error", "output error", "kernel", box=None)
    for tensor in facts["tensors"]:
        table.add_row(
            tensor["name"],
            "x".join(map(str, tensor["shape"])),
            tensor["format"],
            f"{tensor['bits_per_weight']:.3f}",
            f"{tensor['error']:.4f}" if "error" in tensor else "-",
            f"{tensor['output_error']:.4f}" if "output_error" in tensor else "-",
            kernels[tensor["name"]][0],
        )
    out.print(table)
    refusals = [
        (name, f"not {other}: {why}") for name, (_, refused) in kernels.items() for other, why in refused.items()
    ]
    print_lines([f"{name}: {reason}" for name, reason in alike(refusals)])
    for note in facts.get("scaled", []):
        rule = f"{note['rule']} {note['alpha']:.2f}" if "alpha" in note else note["rule"]
        readers = ", ".join(name.removeprefix(f"{note['source'].rpartition('.')[0]}.") for name in note["readers"])
        out.print(f"scaled: {note['source']} for {readers}: {rule}", highlight=False, markup=False, soft_wrap=True)
    before, after = facts["bytes_before"], facts["bytes_after"]
    out.print(
        f"\n{facts['model']}: {size(before)} -> {size(after)}, "
        f"{facts['bits_per_weight']:.3f} bits per quantized weight"
        + (f"; {len(facts['files'])} files and {len(facts['tensors'])} tensors verified" if verify else ""),
        highlight=False,
        soft_wrap=True,
    )


def verify(
    folder: FolderArgument,
    reference: Annotated[str, typer.Option(help="The model it was made of.")],
    text: Annotated[str | None, typer.Option(help="Text to show to both [random tokens].")] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of it.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 128,
    max_kl: Annotated[float, typer.Option(help="Nats a token, at most.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 [the reference's own].")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare FOLDER with the model it was made of, block by block; neither is in memory as a whole.

    Hashes every file, then compares weights, outputs of blocks and, at the end, predictions. A difference that the
    format does not explain, or a KL divergence above --max-kl, ends with exit code 7.
    """
    from llmquant import api, inspection, rotation, verification
    from llmquant.checkpoint import Checkpoint, locate

    facts = inspection.manifest(folder)
    settings = facts.get("settings", {})
    _, original = rotation.opened(
        Checkpoint(locate(reference)),
        settings.get("rotate", "none"),
        settings.get("seed", 0),
        device=device or api.default_device(),
        dtype=dtype_named(dtype),
        trust_remote_code=trust_remote_code,
    )
    if text is None:
        shown = verification.random_windows(original, windows, length, seed)
    else:
        shown, _ = api.evaluation_windows(reference, text, "documents", length, windows, trust_remote_code)
    with progress_bar(as_json) as progress:
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
    out.print(f"\nverified: {verified(facts)}, {found.seconds:.1f} s", highlight=False, soft_wrap=True)


COMMANDS = (inspect, verify)
