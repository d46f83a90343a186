"""CPU seconds and memory of the solver on one linear, beside plain GPTQ.

    python eval/solver_speed.py --shapes 4096x11008 11008x4096 --tokens 4096

Inputs are those of a low-rank mix with noise and a few loud channels; the quantized stream is off by 15 %. Plain GPTQ
is this project's own: one sweep on the grid that a search found (`target` off, `rounds` 0, no curvature). Statistics
are timed apart: balanced sums up two matrices, GPTQ one. Memory is anonymous, beyond what was there before the solver;
Linux only. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from typing import Any

import torch
from torch import Tensor

from llmquant import formats
from llmquant.solvers import SOLVERS
from llmquant.stats import Stats

WAYS: dict[str, dict[str, Any]] = {"plain": {"target": False, "rounds": 0}, "balanced": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x11008"], metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, default=4096, help="an eighth of them is held out")
    parser.add_argument("--format", default="int4:g128")
    args = parser.parse_args()
    results = []
    for shape in args.shapes:
        rows, columns = map(int, shape.split("x"))
        for result in measured(rows, columns, args.tokens, args.format):
            print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            results.append(result)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}))


def measured(rows: int, columns: int, tokens: int, spec: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    fmt, w = formats.get(spec).stored_for(torch.float16), torch.randn(rows, columns, generator=generator) * 0.02
    mix = torch.randn(max(1, min(256, columns // 8)), columns, generator=generator) * 0.5
    loud = 1 + 5.0 * (torch.rand(columns, generator=generator) < 0.01)

    def inputs(count: int) -> tuple[Tensor, Tensor]:
        one, other = (
            (
                torch.randn(count, len(mix), generator=generator) @ mix / 4
                + torch.randn(count, columns, generator=generator)
            )
            * loud
            for _ in range(2)
        )
        return one, one + 0.15 * other

    for options in WAYS.values():  # compiles the loops
        few = Stats.empty(64)
        few.update(torch.randn(128, 64), torch.randn(128, 64))
        SOLVERS["gptq"](torch.randn(32, 64), few, formats.get("int4:g32:fp16"), **options)
    stats, spent = Stats.empty(columns), 0.0
    stats.last = rows < columns
    for start in range(0, tokens - tokens // 8, 2048):
        x, x_ref = inputs(min(2048, tokens - tokens // 8 - start))
        began = time.process_time()
        stats.update(x, x_ref, (x_ref - x) @ w.T if stats.last else None)
        spent += time.process_time() - began
    x, x_ref = inputs(tokens // 8)
    stats.hold(x, x_ref, (x_ref - x) @ w.T if stats.last else None)
    g = torch.randn(-(-rows // 32), 64, 32, generator=generator)
    found = []
    for way, options in WAYS.items():
        stats.shared.clear()
        stats.curvature = g.mT @ g / 64 if way == "balanced" else None
        with Peak() as peak:
            began = time.process_time()
            solution = SOLVERS["gptq"](w, stats, fmt, **options)
            seconds = time.process_time() - began
        facts = {"shape": f"{rows}x{columns}", "format": spec, "solver": way, "cpu_seconds": round(seconds, 1)}
        memory = {"statistics_seconds": round(spent, 1), "gib": round(peak.highest / 2**30, 2)}
        found.append({**facts, **memory, "error": round(solution.steps[-1].error, 5)})
    return found


class Peak:
    """The most anonymous memory while it is entered, beyond what there was before, in bytes."""

    highest = 0

    def __enter__(self) -> Peak:
        self.before, self.done = anonymous(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.01):
            self.highest = max(self.highest, anonymous() - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
