"""Few bits by four ways: rounding to nearest, that tuned, calibration, and training while rounded, in one table.

    python eval/qat.py MODEL --data train.json --text held_out.json --output runs --result qat.json

Every run is a command of llmquant in a process of its own, which `result` lists with its CPU seconds and peak memory;
folders that lie in --output are not made again. Divergences are in nats per token, on text that no run has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from script import as_command

from llmquant import api, metrics

METHODS = ("rtn", "tuned", "balanced", "best", "qat")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="text, or token ids, to calibrate and train on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=["int2:g64", "ternary:g128"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1024, help="windows to train on")
    parser.add_argument("--max-windows", type=int, default=200, help="windows to measure on")
    return parser.parse_args()


def command(args: argparse.Namespace, method: str, spec: str, seed: str) -> list[str]:
    """The command of a run, without its output."""
    training = ["--samples", str(args.samples), "--steps", str(args.steps), "--batch", str(args.batch)]
    common = ["--seed", seed, "--dtype", "float32"]
    if method == "qat":
        return ["qat", args.model, "--format", spec, "--data", args.data, *training, *common]
    if method == "tuned":
        start = str(folder(args, "rtn", spec, "0"))
        return ["tune", start, "--reference", args.model, "--calibration", args.data, *training, *common]
    quality = ["--quality", "fast"] if method == "rtn" else ["--quality", method, "--calibration", args.data]
    return ["quantize", args.model, "--format", spec, *quality, *common]


def folder(args: argparse.Namespace, method: str, spec: str, seed: str) -> Path:
    return Path(args.output) / f"{method}-{spec.replace(':', '-')}-{seed}"


def run(words: list[str], output: Path) -> dict[str, Any]:
    """Run a command; its costs, which are kept beside the folder."""
    costs = output.with_name(f"{output.name}.json")
    if not output.is_dir():
        process = subprocess.Popen([sys.executable, "-m", "llmquant.cli", *words, "-o", str(output)])
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"llmquant {' '.join(words)}: ended with {os.waitstatus_to_exitcode(status)}")
        facts = {"command": ["llmquant", *words], "cpu_seconds": used.ru_utime, "peak_bytes": used.ru_maxrss * 1024}
        costs.write_text(json.dumps(facts))
    return dict(json.loads(costs.read_text()))


def main() -> None:
    args = arguments()
    args.output.mkdir(exist_ok=True)
    windows = api.evaluation_windows(args.model, args.text, "documents", None, args.max_windows, False)
    rows = []
    for spec in args.formats:
        for method in args.methods:
            for seed in args.seeds if method != "rtn" else ["0"]:
                made = folder(args, method, spec, seed)
                costs = run(command(args, method, spec, seed), made)
                found = api.measure(str(made), args.model, *windows, torch.float32, False, lambda done, total: None)
                bits = metrics.stored_size(made).bits_per_weight
                rows.append({"format": spec, "method": method, "seed": seed, "bits": bits, **costs, **found})
                figures = f"{bits:6.3f} bits  KL {found['kl_mean']:.4f}  {costs['cpu_seconds']:.0f} s"
                print(f"{spec:14} {method:9} {seed} {figures}", flush=True)
    settings = {key: str(value) for key, value in vars(args).items()}
    args.result.write_text(json.dumps({"settings": settings, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    as_command(main)
