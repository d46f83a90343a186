"""llmquant beside other quantizers: same model, same calibration tokens, same layers, same held-out text.

    python eval/compare.py tests/assets/pycode --text pycode --formats int4:g32:sym int3:g32:sym \\
        --python gptqmodel=venvs/gm/bin/python --python auto-round=venvs/ar/bin/python --output rivals.json

Each tool runs in a Python of its own (`--python TOOL=PATH`), through `rivals.py`; a tool without one is skipped by
name. Linear layers inside the repeated blocks are quantized, the embedding and the head never; results are measured as
dense float32 models of the decoded weights. TEXT is `pycode` (the standard library, as the bundled model knows it:
calibration takes packages that it was trained on, evaluation those held out) or a file, whose first documents are for
calibration and whose rest is for evaluation. For methods: `rtn` rounds over the whole range and `rtn-mse` over the one
of least squared error, on the grid that GPTQ and compressed-tensors use; `llmquant-QUALITY` are this project's own
(`fast` reads weights only, `fast-calibrated` is `fast` with `--calibration`, and `balanced-unchecked` takes the wrong
text as it is), and `own-SOLVER` its code for a method by the paper, without what the presets add.

`--calibration` gives other tokens than TEXT's, alike for all tools: `self`, which the model samples by itself, or any
text, so that the cost of a wrong domain can be measured; `--calibration-windows` gives more or fewer of them.

The environments: `pip install torch` and then `auto-round`, `llmcompressor` or `hqq transformers accelerate`; GPTQModel
with `--no-deps --no-build-isolation` after what its requirements.txt names, as it asks for a CUDA build otherwise.

Results are added to OUTPUT after each run, and what it holds is not run again: a cut comparison goes on where it
stopped. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from script import as_command
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llmquant import chats, matrices, metrics, sampling, text
from llmquant.errors import DataError
from llmquant.recipe import QUALITIES

HERE = Path(__file__).resolve().parent
# Method -> the tool whose environment runs it. llmquant's environment is this one.
METHODS = {
    "rtn": "llmquant",
    "rtn-mse": "llmquant",
    **{f"llmquant-{quality}": "llmquant" for quality in QUALITIES},
    "llmquant-fast-calibrated": "llmquant",
    "llmquant-balanced-unchecked": "llmquant",
    **{f"own-{solver}": "llmquant" for solver in ("gptq", "gptaq", "adaround", "autoround", "hqq")},
    "gptqmodel": "gptqmodel",
    "llm-compressor-gptq": "llm-compressor",
    "llm-compressor-awq": "llm-compressor",
    "llm-compressor-rtn": "llm-compressor",
    "auto-round": "auto-round",
    "hqq": "hqq",
}
TOOLS = tuple(dict.fromkeys(METHODS.values()))
# Methods that read neither seed nor calibration text.
SEEDLESS = ("rtn", "rtn-mse", "llmquant-fast", "llm-compressor-rtn", "hqq", "own-hqq")
# What tells one result from another.
KEY = ("model", "format", "method", "calibration", "calibration_windows", "seed", "only_divisible")
Result = dict[str, Any]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder")
    parser.add_argument("--text", required=True, help="pycode, or a file: text, .json, .jsonl, .parquet")
    parser.add_argument("--calibration-share", type=float, default=0.35, help="of a file's documents")
    parser.add_argument("--formats", nargs="+", default=["int4:g32:sym", "int3:g32:sym", "int2:g32:sym"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH", help=f"tools: {', '.join(TOOLS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each chooses other calibration windows")
    parser.add_argument("--calibration", nargs="+", default=["text"], metavar="SOURCE", help="text, self, pycode, FILE")
    parser.add_argument("--windows", type=int, default=128, help="of calibration, and of evaluation")
    parser.add_argument("--calibration-windows", nargs="+", type=int, metavar="N", help="of calibration [--windows]")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--only-divisible", type=int, default=1, metavar="N", help="leave other layers alone, for all")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run")
    parser.add_argument("--logs", type=Path, help="a folder for what the tools print [none is kept]")
    parser.add_argument("--output", type=Path, required=True, help="JSON; results are added to those it holds")
    args = parser.parse_args(argv)
    args.calibration_windows = args.calibration_windows or [args.windows]
    args.python = dict(entry.split("=", 1) for entry in args.python)
    if unknown := set(args.python) - set(TOOLS):
        parser.error(f"--python: unknown {', '.join(sorted(unknown))}: tools are {', '.join(TOOLS)}")
    return args


# ---- tokens


def documents(source: str, share: float) -> tuple[list[str], list[str]]:
    """(calibration, evaluation) texts that have no document in common."""
    if source == "pycode":
        sys.path.insert(0, str(HERE.parent / "tests" / "assets"))
        from train_pycode import documents as standard_library

        return standard_library(held_out=False), standard_library(held_out=True)
    everything = text.read_documents(source)
    cut = int(len(everything) * share)
    calibration = everything[:cut]
    seen = set(calibration)
    return calibration, [document for document in everything[cut:] if document not in seen]


def drawn(rows: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the windows (n, length), without replacement, in the order that the seed gives."""
    _check_enough(rows, count, "calibration")
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` of the windows (n, length), evenly spaced from the first to the last."""
    _check_enough(rows, count, "evaluation")
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def _check_enough(rows: Tensor, count: int, use: str) -> None:
    if len(rows) < count:
        raise DataError(f"{len(rows)} windows of {rows.shape[1]} tokens for {use}, {count} asked for: give more text")


# ---- one run


@dataclass(frozen=True)
class Shown:
    """What a method is calibrated on, by default nothing. source: as `--calibration` takes it; windows: how many."""

    source: str = "none"
    windows: int = 0
    seed: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        return Path(self.source).name, self.windows, self.seed


@dataclass(frozen=True)
class Setting:
    """What all methods share. layers: names to quantize; skipped: linears of the blocks that are left alone.

    calibration: of each source but "self", all windows that seeds draw from.
    """

    args: argparse.Namespace
    reference: Any
    tokenizer: Any
    calibration: dict[str, Tensor]
    evaluation: Tensor
    layers: list[str]
    skipped: list[str]

    @classmethod
    def make(cls, args: argparse.Namespace) -> Setting:
        tokenizer = text.load_tokenizer(args.model)

        def cut(texts: list[str]) -> Tensor:
            return text.windows(text.token_stream(tokenizer, texts, protocol="documents"), args.length)

        own, held_out = documents(args.text, args.calibration_share)
        calibration = {
            source: cut(own if source == "text" else documents(source, 1.0)[0])
            for source in args.calibration
            if source != "self"
        }
        reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        layers, skipped = chosen_layers(reference, args.only_divisible)
        chosen = spread(cut(held_out), args.windows)
        return cls(args, reference, tokenizer, calibration, chosen, layers, skipped)

    def tokens(self, shown: Shown) -> Tensor:
        """The windows (windows, length) that a method is shown."""
        count, length = shown.windows, self.args.length
        if not count:
            return torch.empty(0, length, dtype=torch.int64)
        if shown.source == "self":
            return sampling.sample_windows(
                self.reference,
                bos_token_id=self.reference.config.get_text_config().bos_token_id,
                count=count,
                length=length,
                seed=shown.seed,
                turns=chats.turns(self.tokenizer),
            )
        return drawn(self.calibration[shown.source], count, shown.seed)


def chosen_layers(model: Any, only_divisible: int = 1) -> tuple[list[str], list[str]]:
    """(names to quantize, names left alone) of the linears in repeated blocks; `only_divisible`: of both dimensions."""
    linears = {
        f"{block}.{name}": module
        for block, part in matrices.decoder_blocks(model).items()
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
    }
    fits = {name for name, module in linears.items() if all(size % only_divisible == 0 for size in module.weight.shape)}
    return [name for name in linears if name in fits], [name for name in linears if name not in fits]


def run(setting: Setting, method: str, spec: str, shown: Shown) -> Result:
    """One method's result, measured; or what it failed with, under "error"."""
    args = setting.args
    result: Result = {**dict(zip(KEY, key(args, method, spec, shown), strict=True)), **conditions(args)}
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/tokens.npy", setting.tokens(shown).numpy())
        names = {"layers": setting.layers, "skipped": setting.skipped}
        Path(folder, "layers.json").write_text(json.dumps(names))
        command = [python(args, method), str(HERE / "rivals.py"), method]
        command += [
            "--model",
            str(Path(args.model).resolve()),
            "--tokens",
            f"{folder}/tokens.npy",
            "--layers",
            f"{folder}/layers.json",
        ]
        command += ["--format", spec, "--seed", str(shown.seed), "--iterations", str(args.iterations)]
        command += ["--layers", f"{folder}/layers.json", "--output", f"{folder}/weights.safetensors"]
        try:  # in the folder that is deleted: some tools write logs where they stand
            done = subprocess.run(
                command, cwd=folder, env=environment(args), capture_output=True, text=True, timeout=args.timeout
            )
        except subprocess.TimeoutExpired:
            return {**result, "error": f"not done after {args.timeout:.0f} s"}
        if args.logs is not None:
            args.logs.mkdir(parents=True, exist_ok=True)
            name = "-".join(map(str, identity(result))).replace(":", "-")
            (args.logs / f"{name}.log").write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode != 0:
            return {**result, "error": last_line(done.stderr) or f"exit code {done.returncode}"}
        facts = json.loads(last_line(done.stdout))
        return {**result, **measure(setting, load_file(f"{folder}/weights.safetensors"), spec), **facts}


def key(args: argparse.Namespace, method: str, spec: str, shown: Shown) -> tuple[Any, ...]:
    """By KEY."""
    return (Path(args.model).name, spec, method, *shown.key, args.only_divisible)


def conditions(args: argparse.Namespace) -> Result:
    """What results have to share to be compared."""
    return {"windows": args.windows, "length": args.length, "iterations": args.iterations}


def python(args: argparse.Namespace, method: str) -> str:
    """The interpreter, not what a link of it points to: a virtual environment is found by the link."""
    return os.path.abspath(args.python.get(METHODS[method], sys.executable))


def environment(args: argparse.Namespace) -> dict[str, str]:
    """All methods run on the CPU, offline, on the same number of threads."""
    fixed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.threads)}


def last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


# ---- what came of it


@torch.no_grad()
def measure(setting: Setting, weights: dict[str, Tensor], spec: str) -> Result:
    """How far the model with these weights in place is from its reference, and what was changed."""
    model = AutoModelForCausalLM.from_pretrained(setting.args.model, dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    originals = dict(setting.reference.named_parameters())
    for name, weight in weights.items():
        if name.removesuffix(".weight") in setting.skipped:
            raise DataError(f"{name}: was to be left alone")
        parameters[name].copy_(weight)
    changed = {name: value for name, value in parameters.items() if not torch.equal(value, originals[name])}
    linears = [f"{name}.weight" for name in setting.layers]
    vocabulary = text.vocabulary_size(setting.tokenizer)
    found = metrics.divergence(setting.reference, model, setting.evaluation, vocabulary=vocabulary)
    return {
        "kl": found.mean,
        "kl_standard_error": found.standard_error,
        "perplexity": found.model.perplexity,
        "reference_perplexity": found.reference.perplexity,
        "top1_agreement": found.top1_agreement,
        "layers_changed": sum(name in changed for name in linears),
        "layers": len(setting.layers) + len(setting.skipped),
        "other_tensors_changed": len(set(changed) - set(linears)),
        "levels": max((levels(changed[name], columns(spec)) for name in linears if name in changed), default=0),
    }


def columns(spec: str) -> int:
    """Columns of a group.

    >>> columns("int4:g128:sym")
    128
    """
    return next((int(part[1:]) for part in spec.split(":") if part[0] == "g"), {"nvfp4": 16}.get(spec, 32))


def levels(weight: Tensor, group: int) -> int:
    """The most different values that any group of a row holds: more than 2**bits is more than was asked for."""
    whole = weight.shape[1] // group * group
    values = weight[:, :whole].reshape(-1, group).sort(-1).values
    tolerance = 1e-5 * values.abs().amax(-1, keepdim=True)
    return 1 + int((values.diff(dim=-1) > tolerance).sum(-1).max()) if whole else 0


# ---- results


def read_results(path: Path) -> list[Result]:
    """Of a result that names no calibration: that of the text, with as many windows as were evaluated."""
    found: list[Result] = json.loads(path.read_text())["results"] if path.is_file() else []
    for result in found:
        for name, value in zip(KEY[3:5], _default(result), strict=True):
            result.setdefault(name, value)
    return found


def _default(result: Result) -> tuple[str, int]:
    """The calibration that goes without saying."""
    return ("none", 0) if result["method"] in SEEDLESS else ("text", result["windows"])


def write_results(path: Path, results: Iterable[Result]) -> None:
    """One result a line, so that a changed one is a changed line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(result) for result in sorted(results, key=identity))
    path.write_text(f'{{"results": [\n{lines}\n]}}\n')


def identity(result: Result) -> tuple[Any, ...]:
    return tuple(result[name] for name in KEY)


def table(results: list[Result]) -> str:
    """One line a model, format and method, the best first: all figures are means over the seeds."""
    groups: dict[tuple[Any, ...], dict[str, list[Result]]] = {}
    for result in results:
        place = (result["model"], result["only_divisible"], result["format"])
        groups.setdefault(place, {}).setdefault(label(result), []).append(result)
    lines = [
        "| model | format | method | seeds | KL | ± | perplexity | top-1 | CPU s | wall s | peak MB | layers |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, divisible, spec), methods in sorted(groups.items()):
        name = model if divisible == 1 else f"{model} (÷{divisible})"
        ranked = sorted(methods.items(), key=lambda item: _mean(item[1], "kl"))
        lines += [f"| {name} | {spec} | {method} | {_cells(runs)} |" for method, runs in ranked]
    return "\n".join(lines)


def label(result: Result) -> str:
    """The method, and the calibration where that does not go without saying.

    >>> label({"method": "llmquant-balanced", "calibration": "self", "calibration_windows": 16, "windows": 128})
    'llmquant-balanced (self, 16 windows)'
    """
    source, count = result["calibration"], result["calibration_windows"]
    return result["method"] + ("" if (source, count) == _default(result) else f" ({source}, {count} windows)")


def _mean(runs: list[Result], name: str) -> float:
    values = [run[name] for run in runs if name in run]
    return fmean(values) if values else float("inf")


def _cells(runs: list[Result]) -> str:
    good = [run for run in runs if "kl" in run]
    if not good:
        return f"failed: {runs[0]['error']}"
    mean = {name: _mean(good, name) for name in ("kl", "kl_standard_error", "perplexity", "top1_agreement")}
    changed = f"{good[0]['layers_changed']}/{good[0]['layers']}"
    seeds = ",".join(str(run["seed"]) for run in good)
    return (
        f"{seeds} | {mean['kl']:.5f} | {mean['kl_standard_error']:.5f} | {mean['perplexity']:.3f} | "
        f"{mean['top1_agreement']:.2%} | {_mean(good, 'cpu_seconds'):.1f} | {_mean(good, 'wall_seconds'):.1f} | "
        f"{_mean(good, 'peak_bytes') / 1e6:.0f} | {changed}"
    )


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    missing = {METHODS[method] for method in args.methods} - {"llmquant", *args.python}
    for tool in sorted(missing):
        print(f"{tool}: skipped, no environment was given (--python {tool}=PATH)", file=sys.stderr)
    methods = [method for method in args.methods if METHODS[method] not in missing]
    results = {identity(result): result for result in read_results(args.output)}
    setting = Setting.make(args)
    for shown in [Shown(*each) for each in product(args.calibration, args.calibration_windows, args.seeds)]:
        for spec in args.formats:
            for method in methods:
                seen = Shown() if method in SEEDLESS else shown
                place = key(args, method, spec, seen)
                done = results.get(place, {})
                if "kl" in done and conditions(args).items() <= done.items():
                    continue
                results[place] = found = run(setting, method, spec, seen)
                write_results(args.output, results.values())
                figures = f"KL {found['kl']:.5f}, {found['cpu_seconds']} CPU s" if "kl" in found else found["error"]
                print(f"{spec} {label(found)} seed {seen.seed}: {figures}", file=sys.stderr, flush=True)
    print(table(list(results.values())))
    print(json.dumps({"settings": {**vars(args)}, "results": list(results.values())}, default=str))


if __name__ == "__main__":
    as_command(main)
