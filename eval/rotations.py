"""What rotations gain or cost: formats, qualities and models, with outliers and without, on held-out text.

    python eval/rotations.py tests/assets/pycode --text pycode --output eval/results/rotations.json
    python eval/rotations.py MODEL --text FILE --formats int4:g32 mxfp4 --output eval/results/rotations.json

Of every model (a Llama in its names) there are versions with planted outliers, which compute the same (outliers.py).
norms: of every norm, CHANNELS weights are FACTOR times as large, and the columns that read them are divided by it;
massive: massive activations at BOS, in a wider model; wide: that without them. TEXT is what `eval/compare.py` takes.
Results are added to OUTPUT after each run, and what it holds is not run again. The last line of stdout is one JSON
object; divergences are from the original in float32, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import outliers
import torch
from compare import documents, drawn, spread
from safetensors.torch import save_file
from script import as_command
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmquant
from llmquant import metrics, rotation, text
from llmquant.recipe import QUALITIES

CHANNELS, FACTOR = 5, 30.0
# What tells one result from another.
KEY = ("model", "outliers", "format", "quality", "rotate", "seed", "calibration_windows")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder")
    parser.add_argument("--text", required=True, help="pycode, or a file: text, .json, .jsonl, .parquet")
    parser.add_argument("--calibration-share", type=float, default=0.35, help="of a file's documents")
    parser.add_argument("--formats", nargs="+", default=["int4:g32", "mxfp4", "int4:g128"])
    parser.add_argument("--qualities", nargs="+", default=["fast", "balanced"], choices=list(QUALITIES))
    parser.add_argument("--rotate", nargs="+", default=["none", "value", "residual"], choices=list(rotation.MODES))
    parser.add_argument(
        "--outliers", nargs="+", default=["none", "norms"], choices=["none", "norms", "wide", "massive"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--windows", type=int, default=64, help="of evaluation")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--output", type=Path, required=True, help="JSON; results are added to those it holds")
    return parser.parse_args()


def planted(model: Path, folder: Path, kind: str) -> Path:
    """The same model in float32 with outliers, in the folder; the model itself for none."""
    if kind == "none":
        return model
    llama = outliers.loaded(model)
    if kind == "norms":
        llama = outliers.hidden_by_norms(llama, FACTOR, CHANNELS)
    else:
        llama = outliers.widened(llama)[0] if kind == "wide" else outliers.massive(llama)
    return outliers.saved(llama, model, folder / kind)


def run(model: Path, calibration: Tensor, row: dict[str, Any], folder: Path) -> Path:
    """Quantize as the row says; the folder of the result. Adds the seconds of CPU to the row."""
    shown = {}
    if QUALITIES[row["quality"]].calibrated:
        save_file(
            {"tokens": drawn(calibration, row["calibration_windows"], row["seed"])}, folder / "tokens.safetensors"
        )
        shown = {"calibration": str(folder / "tokens.safetensors"), "samples": row["calibration_windows"]}
    start = time.process_time()
    options = {name: row[name] for name in ("format", "quality", "rotate", "seed")}
    llmquant.quantize(model, folder / "out", **options, **shown, dtype=torch.float32, report=False)
    row["cpu_seconds"] = round(time.process_time() - start, 2)
    return folder / "out"


def table(results: list[dict[str, Any]]) -> str:
    """One line a model, format and quality: the mean divergence over seeds for each rotation."""
    modes = list(dict.fromkeys(result["rotate"] for result in results))
    lines = [f"| model | format | quality | {' | '.join(modes)} |", f"|---|---|---|{'---|' * len(modes)}"]
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for result in results:
        name = result["model"] + {"none": "", "norms": ", outliers"}.get(result["outliers"], f", {result['outliers']}")
        place = cells.setdefault((name, result["format"], result["quality"]), {})
        place.setdefault(result["rotate"], []).append(result["kl"])
    for names, found in sorted(cells.items()):
        means = {mode: fmean(values) for mode, values in found.items()}
        least = min(means.values())
        texts = {mode: f"**{mean:.4f}**" if mean == least else f"{mean:.4f}" for mode, mean in means.items()}
        shown = [texts.get(mode, "") for mode in modes]
        lines.append(f"| {' | '.join(names)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    plain = Path(args.model)
    tokenizer = text.load_tokenizer(plain)
    calibration, evaluation = (
        text.windows(text.token_stream(tokenizer, part, protocol="documents"), args.length)
        for part in documents(args.text, args.calibration_share)
    )
    evaluation = spread(evaluation, args.windows)
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    results: list[dict[str, Any]] = json.loads(args.output.read_text())["results"] if args.output.is_file() else []
    done = {tuple(result[key] for key in KEY) for result in results}
    with tempfile.TemporaryDirectory() as scratch:
        models = {kind: planted(plain, Path(scratch), kind) for kind in args.outliers}
        for seed, spec, quality, kind, mode in product(args.seeds, args.formats, args.qualities, models, args.rotate):
            windows = args.calibration_windows if QUALITIES[quality].calibrated else 0
            place = (plain.name, kind, spec, quality, mode, seed, windows)
            if place in done:
                continue
            row: dict[str, Any] = dict(zip(KEY, place, strict=True))
            with tempfile.TemporaryDirectory() as folder:
                loaded = llmquant.load(run(models[kind], calibration, row, Path(folder)), dtype=torch.float32)
                found = metrics.divergence(reference, loaded, evaluation, vocabulary=text.vocabulary_size(tokenizer))
            row |= {"kl": found.mean, "kl_standard_error": found.standard_error, "perplexity": found.model.perplexity}
            results.append(row | {"windows": args.windows, "length": args.length})
            print(f"{place}: KL {found.mean:.5f}, {row['cpu_seconds']} CPU s", file=sys.stderr, flush=True)
            lines = ",\n".join(json.dumps(result) for result in results)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(f'{{"results": [\n{lines}\n]}}\n')
    print(table(results))
    print(json.dumps({"settings": vars(args), "results": results}, default=str))


if __name__ == "__main__":
    as_command(main)
