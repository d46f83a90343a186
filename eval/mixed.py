"""Mixed precision beside uniform recipes of the same size, and how well the cheap estimates rank what is measured.

    python eval/mixed.py tests/assets/pycode --text pycode --output mixed.json

For every uniform recipe, and for the sizes of `--bits`, the formats of `--formats` are mixed within exactly its bits a
weight, as `llmquant quantize --target-bpw` does with `--sensitivity kl`; all weights are rounded to nearest, as by
`--quality fast`. Costs are found out on windows of the calibration text that the seed chooses; KL is that of held-out
text. TEXT is as for compare.py: `pycode`, or a file whose first documents are for calibration and the rest for
evaluation. With `--calibrated`, uniform recipes and mixtures are also run with `--quality balanced`, one run a seed.

Rank correlations are Spearman's between costs measured alone and Fisher's or the Hessian's estimates: of all sets and
candidates, and the mean of those among the sets within one candidate. The last line of stdout is one JSON object, and
so is OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import documents, drawn, spread
from safetensors.torch import save_file
from script import as_command
from torch import Tensor
from transformers.utils import logging

from llmquant import allocate, api, metrics, pipeline, text
from llmquant.blocks import StreamedModel
from llmquant.curvature import curvature
from llmquant.job import Budget, Job, Prepared, silent
from llmquant.knapsack import Numbers
from llmquant.recipe import Recipe
from llmquant.sensitivity import Fused, Whole, estimated, measured, sizes

BATCH = 8
CHARACTERS = 2_000_000  # of either text, from documents spread evenly over all


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder")
    parser.add_argument("--text", required=True, help="pycode, or a file: text, .json, .jsonl, .parquet")
    parser.add_argument("--calibration-share", type=float, default=0.35, help="of a file's documents")
    parser.add_argument("--formats", nargs="+", default=["int2:g64", "int3:g64", "nf4:g64", "int5:g64", "int6:g64"])
    parser.add_argument("--uniform", nargs="+", default=["int2:g32", "int3:g64", "int3:g32", "int4:g64", "int4:g32"])
    parser.add_argument("--bits", nargs="+", type=float, default=[5.0], help="sizes without a uniform recipe")
    parser.add_argument(
        "--calibrated", nargs="*", default=[], metavar="FORMAT", help="of the uniform ones, balanced too"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=32, help="of evaluation")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class Setting:
    """What all runs share. calibration: all windows that seeds draw from; evaluation (windows, length)."""

    args: argparse.Namespace
    prepared: Prepared
    calibration: Tensor
    evaluation: Tensor

    @classmethod
    def make(cls, args: argparse.Namespace) -> Setting:
        tokenizer = text.load_tokenizer(args.model)
        calibration, evaluation = (
            text.windows(text.token_stream(tokenizer, some(texts), protocol="documents"), args.length)
            for texts in documents(args.text, args.calibration_share)
        )
        budget = Budget(bits=16.0, formats=tuple(args.formats), sensitivity="kl")
        job = Job(args.model, Recipe.uniform(args.formats[0]), None, budget=budget)
        prepared = pipeline.prepare(job, args.output.with_suffix(".none"))
        return cls(args, prepared, calibration, spread(evaluation, args.windows))

    def model(self) -> StreamedModel:
        return StreamedModel(self.prepared.checkpoint, dtype=torch.float32)

    def shown(self, seed: int) -> Tensor:
        return drawn(self.calibration, allocate.TOKENS // allocate.LENGTH, seed)[:, : allocate.LENGTH]

    def bits(self, nbytes: float) -> float:
        return float(8 * nbytes / self.prepared.plan.weights)


def some(texts: list[str]) -> list[str]:
    return texts[:: max(1, sum(map(len, texts)) // CHARACTERS)]


def uniform(setting: Setting, judge: Whole) -> dict[str, dict[str, float]]:
    """Bits a weight and KL of every uniform recipe."""
    found = {}
    for spec in setting.args.uniform:
        job = Job(setting.args.model, Recipe.uniform(spec), None)
        plan = pipeline.prepare(job, setting.args.output.with_suffix(".none")).plan
        judge.put(plan.rows)
        found[spec] = {"bits": plan.bits_per_weight, "kl": judge.divergence()}
    return found


def mixed(
    setting: Setting, judge: Whole, sizes_wanted: dict[str, float], seed: int
) -> tuple[list[Fused], Numbers, list[dict[str, Any]]]:
    """The best mixture of every size by measured costs: its bits, the KL predicted, and that of held-out text."""
    plan, budget = setting.prepared.plan, setting.prepared.job.budget
    assert budget is not None
    results = []
    with Whole(setting.model(), setting.shown(seed), BATCH, silent) as whole:
        sets = whole.sets(setting.prepared.checkpoint, list(plan.rows), budget.formats)
        start = time.process_time()
        alone = measured(whole, sets, silent)
        seconds = time.process_time() - start

        def divergence(picks: tuple[int, ...]) -> float:
            for part, pick in zip(sets, picks, strict=True):
                whole.put(part.options[pick])
            return whole.divergence()

        for name, bits in sizes_wanted.items():
            wanted = Budget(bits=bits, formats=budget.formats)
            search = allocate.Search(plan, list(plan.rows), wanted, sizes(sets), divergence)
            start = time.process_time()
            first = search.best(alone)
            chosen, _ = allocate.searched(whole, sets, search, alone, silent)
            row: dict[str, Any] = {"like": name, "seed": seed, "budget": bits, "bits": setting.bits(chosen.nbytes)}
            row |= {"predicted_kl": chosen.predicted, "gap": chosen.gap}
            row |= {"cpu_seconds_alone": seconds, "cpu_seconds_context": time.process_time() - start}
            for key, pick in (("kl_without_context", first), ("kl", chosen)):
                for part, option in zip(sets, pick.picks, strict=True):
                    judge.put(part.options[option])
                row[key] = judge.divergence()
            row["formats"] = [budget.formats[pick] for pick in chosen.picks]
            print(f"{name:10} seed {seed}: {row['bits']:.3f} bits, KL {row['kl']:.5f}", file=sys.stderr, flush=True)
            results.append(row)
    return sets, alone, results


def correlations(setting: Setting, seed: int, alone: Numbers) -> dict[str, dict[str, float]]:
    """Of the estimates with costs measured alone."""
    prepared, shown = setting.prepared, setting.shown(seed)
    curves = {name: part.blocks for name, part in curvature(setting.model(), shown, batch=BATCH, seed=seed).items()}
    found = {}
    for how, given in (("fisher", curves), ("hessian", None)):
        _, costs = estimated(
            setting.model(),
            prepared.checkpoint,
            shown,
            BATCH,
            list(prepared.plan.rows),
            tuple(setting.args.formats),
            given,
            silent,
        )
        within = [spearman(costs[:, pick], alone[:, pick]) for pick in range(alone.shape[1])]
        found[how] = {"all": spearman(costs.ravel(), alone.ravel()), "within_a_format": float(np.mean(within))}
        if how == "fisher":
            found[how]["median_ratio"] = float(np.median(costs / alone))
    return found


def spearman(a: Numbers, b: Numbers) -> float:
    """The correlation of ranks."""
    x, y = (np.argsort(np.argsort(values)) - (len(values) - 1) / 2 for values in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def calibrated(setting: Setting, spec: str, bits: float, seed: int) -> dict[str, Any]:
    """Whole runs with `--quality balanced`: uniform, and mixed within its bits."""
    args = setting.args
    found: dict[str, Any] = {"like": spec, "seed": seed}
    budget = Budget(bits=bits, formats=tuple(args.formats), sensitivity="kl")
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.safetensors")
        save_file({"tokens": drawn(setting.calibration, 128, seed)}, tokens)
        for name, asked in (("uniform", None), ("mixed", budget)):
            start = time.process_time()
            facts = api.quantize(
                args.model, Path(folder, name), format=spec, budget=asked, calibration=str(tokens), seed=seed
            )
            seconds = time.process_time() - start
            original, other = (api.load_any(which, torch.float32) for which in (args.model, str(Path(folder, name))))
            kl = metrics.divergence(original, other, setting.evaluation).mean
            found[name] = {"bits": facts["bits_per_weight"], "kl": kl, "cpu_seconds": seconds}
            print(f"{spec} balanced, {name}, seed {seed}: KL {kl:.5f}", file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    setting = Setting.make(args)
    result: dict[str, Any] = {"model": Path(args.model).name, "formats": args.formats}
    result |= {"command": " ".join(["python", *sys.argv]), "evaluation_tokens": setting.evaluation.numel()}
    with Whole(setting.model(), setting.evaluation, BATCH, silent) as judge:
        result["uniform"] = uniform(setting, judge)
        wanted = {spec: one["bits"] for spec, one in result["uniform"].items()} | {str(b): b for b in args.bits}
        result["mixed"], result["correlations"] = [], []
        for seed in args.seeds:
            _, alone, rows = mixed(setting, judge, wanted, seed)
            result["mixed"] += rows
            result["correlations"].append({"seed": seed, **correlations(setting, seed, alone)})
    result["calibrated"] = [
        calibrated(setting, spec, result["uniform"][spec]["bits"], seed)
        for spec in args.calibrated
        for seed in args.seeds
    ]
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    as_command(main)
