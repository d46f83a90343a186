"""Write docs/results.md: what is measured under eval/results, as tables.

    python eval/tables.py docs/results.md

Nothing in that page is written by hand: what is said there is said here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import compare
import rotations

FEW = "llmquant-fast-calibrated"  # is shown 4 windows where others are shown 128
RESULTS = Path(__file__).resolve().parent / "results"
Result = dict[str, Any]

HEAD = """# Results

What was measured, all of it: every table is made by `python eval/tables.py docs/results.md` of the JSON under
`eval/results`, which holds versions, standard errors and conditions of each run too. KL is the divergence of the
predictions from those of the unquantized model in float32, in nats a token, on held-out text; where several seeds ran,
the mean, with half their range after the sign. A seed chooses other windows of calibration. CPU seconds are those of
one thread of a busy machine, and tell orders, no more: on it the same run took up to twice as long as alone.

`pycode` is the bundled model; `stories260K` has layers whose sides are no multiples of 32, which AutoRound leaves
alone, so all methods do (÷32: 20 of 35 layers are quantized).
"""
RIVALS = """
## Beside other quantizers

128 windows of 512 tokens of real text to calibrate on, the same for all, and 128 others to measure on.

```
python eval/compare.py tests/assets/pycode --text pycode --formats int4:g32:sym int3:g32:sym int2:g32:sym \\
    --seeds 0 1 2 --python gptqmodel=PYTHON --python auto-round=PYTHON ... --output eval/results/rivals.json
python eval/compare.py stories260K --text tinystories_clean.json --only-divisible 32 ...
```

KL as a part of that of others, over the seeds that both ran (their number after it); `fast` reads weights only, and
`fast-calibrated` is shown 2k tokens where GPTQModel is shown 65k:
"""
CALIBRATION = """
## Calibration

What `balanced` makes of other tokens: `text` is the model's own kind, `self` its own samples; `tinystories_clean.json`
is the wrong text for `pycode`, and `pycode` for `stories260K`. `llmquant-balanced-unchecked` took the wrong text as it
is (`--no-calibration-check`). `llmquant-balanced` notices it, and puts the model's own samples in the place of half of
it. `tests/test_domain.py` holds the order (mended, no data, wrong text as it is) for a part of the bundled model.

```
python eval/compare.py MODEL --text TEXT --methods llmquant-fast llmquant-balanced llmquant-balanced-unchecked \\
    --calibration text self OTHER --calibration-windows 4 16 128 --output eval/results/calibration.json
```

Whether text is the wrong one is seen from the model: the cross-entropy of 4096 of its tokens, less the entropy of the
model's predictions, is near 0 for text that it could have written, and above 0.5 the text is taken to be wrong:
of stories it is 1.2 for `pycode`. A model
that was trained to answer rather than to continue may find plain text wrong: that was not tried. Own samples need
the whole model in memory: where there is no room, the run stops and says so, since what is left of such text alone may
be worse than none.
"""
ROTATIONS = """
## Rotations

Rotations folded into the weights (`--rotate`), on the models as they are and with outliers planted that weights undo:
five channels of every norm are 30 times as large, and the columns that read them are divided by it. All layers are
quantized; `balanced` is shown 32 windows.

```
python eval/rotations.py tests/assets/pycode --text pycode --output eval/results/rotations.json
python eval/rotations.py stories260K --text tinystories_clean.json --formats int4:g32 mxfp4 ...
```
"""
CHOICE = """
So `--rotate auto` chooses by what the run does otherwise. Where scales are moved out of norms (`gptq`, `awq`), outliers
did no harm in what was measured (stories260K, int4:g32), and it rotates nothing. Else it rounds the model to nearest
each way, shows it 512 random tokens, and rotates where a fifth of the divergence goes. The folder notes the choice and
all figures.
"""
MIXED = """
## Mixed precision

Uniform recipes, and mixtures chosen within exactly their bits a weight by costs measured one set at a time
(`--sensitivity kl`); weights rounded to nearest as by `--quality fast`, but for the rows with a solver. The text to
choose on is the seed's; KL is that of held-out text.

```
python eval/mixed.py tests/assets/pycode --text pycode --output mixed-pycode.json ...
```
"""
RANKS = """
Rank correlation (Spearman) of the cheap estimates with costs measured alone: of all sets and candidates, and the mean
within one candidate, which is what tells sets apart:
"""

TRAINED = """
## Trained at few bits

The bundled model by four ways to few bits: rounded to nearest (`--quality fast`), scales and norms of that tuned
(`llmquant tune`), `balanced`, and trained while rounded (`llmquant qat`), both training runs for as many steps on as
many windows; on windows that no run has seen. A seed chooses other windows. Peak memory is that of the whole process.

```
python tests/assets/train_pycode.py --training train.json --held-out held_out.json
python eval/qat.py tests/assets/pycode --data train.json --text held_out.json --output runs \\
    --result eval/results/qat.json {arguments}
```
"""


def read(name: str) -> list[Result]:
    found: list[Result] = json.loads((RESULTS / name).read_text())["results"]
    return found


def cell(values: Iterable[float]) -> str:
    """The mean of some seeds, and half their range."""
    found = sorted(values)
    if not found:
        return ""
    return f"{fmean(found):.4f}" + (f" ± {(found[-1] - found[0]) / 2:.4f}" if len(found) > 1 else "")


def grid(rows: list[Result], line: Callable[[Result], str], column: Callable[[Result], str], first: str) -> list[str]:
    """KL, by a line and a column for each result."""
    columns = sorted({column(row) for row in rows})
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        found.setdefault(line(row), {}).setdefault(column(row), []).append(row["kl"])
    lines = [f"| {' | '.join([first, *columns])} |", f"|{'---|' * (len(columns) + 1)}"]
    for name, cells in sorted(found.items()):
        shown = [cell(cells.get(place, [])) for place in columns]
        lines.append(f"| {' | '.join([name, *shown])} |")
    return lines


PAIRS = [(f"llmquant-{quality}", other) for quality in ("balanced", "best") for other in ("gptqmodel", "auto-round")]
PAIRS += [("llmquant-fast", "rtn-mse"), ("llmquant-fast-calibrated", "gptqmodel")]


def ratios(rows: list[Result], pairs: list[tuple[str, str]]) -> list[str]:
    """What part of the other's KL each method leaves, over the seeds that both have."""
    by_run: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        by_run.setdefault((row["model"], row["format"], row["method"]), {})[row["seed"]] = row["kl"]
    headers = [f"{mine.removeprefix('llmquant-')} / {other}" for mine, other in pairs]
    lines = [f"| {' | '.join(['model', 'format', *headers])} |", f"|{'---|' * (len(headers) + 2)}"]
    for model, spec in sorted({(model, spec) for model, spec, _ in by_run}):
        cells = []
        for mine, other in pairs:
            both = [by_run.get((model, spec, method), {}) for method in (mine, other)]
            seeds = sorted(both[0].keys() & both[1].keys())
            part = [fmean(some[seed] for seed in seeds) for some in both] if seeds else []
            cells.append(f"{part[0] / part[1]:.2f} ({len(seeds)})" if part else "")
        if any(cells):
            lines.append(f"| {' | '.join([model, spec, *cells])} |")
    return lines


def mixtures(found: list[Result]) -> list[str]:
    """Every size of every model: the uniform recipe and what was chosen within its bits."""
    lines = ["| model | uniform recipe | bits | its KL | mixed: bits | KL | part |", f"|{'---|' * 7}"]
    for each in found:
        found_at: list[tuple[str, float, list[float], list[Result]]] = []  # name, bits, KL of the uniform runs, mixed
        for like in dict.fromkeys(row["like"] for row in each["mixed"]):
            rows = [row for row in each["mixed"] if row["like"] == like]
            uniform = each["uniform"].get(like)
            found_at.append((like, rows[0]["budget"], [uniform["kl"]] if uniform else [], rows))
        for like in dict.fromkeys(row["like"] for row in each["calibrated"]):
            runs = [row for row in each["calibrated"] if row["like"] == like]
            plain = [run["uniform"] for run in runs]
            mixed = [run["mixed"] for run in runs]
            found_at.append((f"{like}, `balanced`", plain[0]["bits"], [run["kl"] for run in plain], mixed))
        for name, size, kl, rows in sorted(found_at, key=lambda one: one[1]):
            mixed_kl = [row["kl"] for row in rows]
            part = f"{fmean(mixed_kl) / fmean(kl):.2f}" if kl else ""
            bits = max(row["bits"] for row in rows)
            cells = [each["model"], name if kl else "", f"{size:.3f}", cell(kl), f"{bits:.3f}", cell(mixed_kl), part]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def ranks(found: list[Result]) -> list[str]:
    lines = ["| model | estimate | all | within a candidate |", "|---|---|---|---|"]
    for each in found:
        for how in ("fisher", "hessian"):
            values = [[row[how][part] for row in each["correlations"]] for part in ("all", "within_a_format")]
            shown = [f"{min(some):.2f} to {max(some):.2f}" for some in values]
            lines.append(f"| {' | '.join([each['model'], how, *shown])} |")
    return lines


def trained(found: dict[str, Any]) -> list[str]:
    settings = found["settings"]
    names = ("steps", "batch", "samples", "max_windows")
    arguments = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in names)
    runs: dict[tuple[str, str], list[Result]] = {}
    for row in found["results"]:
        runs.setdefault((row["format"], row["method"]), []).append(row)
    lines = [TRAINED.format(arguments=arguments)]
    lines += ["| format | bits | way | KL | perplexity | CPU s | peak MiB |", f"|{'---|' * 7}"]
    for (spec, method), rows in runs.items():
        perplexity = fmean(row["model"]["perplexity"] for row in rows)
        costs = [fmean(row["cpu_seconds"] for row in rows), max(row["peak_bytes"] for row in rows) / 2**20]
        figures = [cell(row["kl_mean"] for row in rows), f"{perplexity:.2f}", *(f"{cost:.0f}" for cost in costs)]
        lines.append(f"| {' | '.join([spec, format(rows[0]['bits'], '.3f'), method, *figures])} |")
    return lines


def page() -> str:
    rivals = [row for row in compare.read_results(RESULTS / "rivals.json") if "kl" in row]
    usual = [row for row in rivals if row["calibration_windows"] in (0, row["windows"]) or row["method"] == FEW]
    calibration = [row for row in compare.read_results(RESULTS / "calibration.json") if "kl" in row]
    parts = [HEAD, RIVALS, *ratios(usual, PAIRS)]
    for name in sorted({row["model"] for row in rivals}):
        parts += ["", f"### {name}", "", compare.table([row for row in rivals if row["model"] == name])]
    parts += [CALIBRATION]
    for name in sorted({row["model"] for row in calibration}):
        rows = [row for row in calibration if row["model"] == name]
        parts += [f"### {name}", "", *grid(rows, _shown, lambda row: row["format"], "method and what it was shown"), ""]
    parts += [ROTATIONS, rotations.table(read("rotations.json")), CHOICE]
    mixed = read("mixed.json")
    parts += [MIXED, *mixtures(mixed), RANKS, *ranks(mixed)]
    parts += [*trained(json.loads((RESULTS / "qat.json").read_text())), ""]
    return "\n".join(parts)


def _shown(row: Result) -> str:
    measured = "" if row["windows"] == 128 else f", measured on {row['windows']}"
    return f"{row['method']}: {row['calibration']}, {row['calibration_windows']} windows{measured}"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
