"""The picture of a run: one page of HTML that needs nothing else, made of what the folder's llmquant.json says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from llmquant import charts
from llmquant.card import command, fitted, learned, percent, recovered, size, tuned, verified

STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #f8fafc; }
body { max-width: 1180px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; } .tiles, .charts { display: grid; gap: .75rem; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); align-items: start; }
.tile, figure { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; margin: 0; padding: .75rem; }
.tile b { display: block; font-size: 1.25rem; overflow-wrap: anywhere; }
.tile b { font-variant-numeric: tabular-nums; } .tile span { color: #64748b; }
figcaption { font-weight: 600; margin-bottom: .25rem; overflow-wrap: anywhere; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; background: #fff; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #fff; border: 1px solid #e2e8f0; border-radius: 8px; padding: .75rem; overflow-x: auto; }
pre.text { max-height: 14rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
NO_CHARTS = (
    "<p>The charts are missing: they need matplotlib, which <code>pip install 'llmquant[plot]'</code> brings.</p>"
)


def page(facts: dict[str, Any]) -> str:
    """HTML of a run. facts: its manifest."""
    title = f"{facts['model']}, quantized"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _tiles(facts),
        _section("Where the error lies", drawn(lambda: list(_maps(facts["tensors"])))),
        _section("Steps of the solver", _decisions(facts["tensors"])),
        _section("Calibration", _coverage(facts)),
        _section("The worst matrices, before and after", drawn(lambda: list(_histograms(facts)))),
        _section("Numbers that went wrong", table(["matrix", "what was done"], recovered(facts))),
        _section("Tuning of all blocks together", _tuning(facts.get("tuning"))),
        _section("Training while rounded", _training(facts.get("qat"))),
        _section("Verified against the original", _verification(facts.get("verification"))),
        _section("Measured", _evaluation(facts.get("evaluation"))),
        _section("Kept as they are", table(["module", "why"], [[k["name"], k["reason"]] for k in facts["kept_dense"]])),
        _section("All matrices", f"<details><summary>{len(facts['tensors'])}</summary>{_all(facts)}</details>"),
        _section("Do it again", f"<pre>{escape(command(facts))}</pre>" + _settings(facts)),
    ]
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def tile(value: str, what: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers to the right. Nothing for no rows."""
    if not rows:
        return ""

    def cell(value: Any, tag: str) -> str:
        number = isinstance(value, int | float)
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if number else str(value)
        return f"<{tag}{' class=n' if number else ''}>{escape(text)}</{tag}>"

    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join("<tr>" + "".join(cell(value, "td") for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def drawn(draw: Callable[[], list[tuple[str, str]]]) -> str:
    """draw() -> captions and pictures."""
    return figures(draw()) if find_spec("matplotlib") else NO_CHARTS


def figures(pictures: list[tuple[str, str]]) -> str:
    found = "".join(f"<figure><figcaption>{escape(text)}</figcaption>{svg}</figure>" for text, svg in pictures)
    return f'<div class="charts">{found}</div>' if found else ""


def _tiles(facts: dict[str, Any]) -> str:
    before, after = facts["bytes_before"], facts["bytes_after"]
    found = [
        tile(f"{size(before)} → {size(after)}", f"size, {before / after:.2f} times smaller"),
        tile(f"{facts['bits_per_weight']:.3f}", "bits a quantized weight"),
        tile(", ".join(sorted({tensor["format"] for tensor in facts["tensors"]})), "format"),
        tile(str(len(facts["tensors"])), "matrices"),
    ]
    measured = facts.get("evaluation") or {}
    if "kl_mean" in measured:
        found.append(tile(f"{measured['kl_mean']:.4f}", "KL divergence, nats a token"))
        sides = measured["reference"]["perplexity"], measured["model"]["perplexity"]
        found.append(tile(f"{sides[0]:.4g} → {sides[1]:.4g}", "perplexity"))
    return f'<div class="tiles">{"".join(found)}</div>'


def _maps(tensors: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    """Maps of block by matrix: bits, error of the weight, and of its outputs where there was calibration."""
    kinds = {"bits_per_weight": "bits a weight", "error": "relative error of the weight"}
    kinds["output_error"] = "relative error of the outputs"
    for key, label in kinds.items():
        rows, values = _by_block(tensors, key)
        if rows:
            yield label, charts.heat_map(key, rows, values, 8.0 if key == "bits_per_weight" else None)


def _by_block(tensors: list[dict[str, Any]], key: str) -> tuple[list[str], list[list[float | None]]]:
    """Names within a block, and the largest value of each in every block; the same matrix of many experts is one."""
    found: dict[str, dict[int, float]] = {}
    for tensor in tensors:
        match = re.match(r".*?\.(\d+)\.(.+)", tensor["name"])
        if match is not None and key in tensor:
            name, block = re.sub(r"\.\d+\.", ".*.", match[2]), int(match[1])
            row = found.setdefault(name, {})
            row[block] = max(row.get(block, 0.0), tensor[key])
    blocks = 1 + max((block for row in found.values() for block in row), default=-1)
    return list(found), [[row.get(block) for block in range(blocks)] for row in found.values()]


def _decisions(tensors: list[dict[str, Any]]) -> str:
    kept: dict[str, list[bool]] = {}
    for tensor in tensors:
        for step in tensor.get("steps", []):
            kept.setdefault(step["name"], []).append(step["kept"])
    if not kept:
        return ""
    counts = [sum(some) for some in kept.values()]
    lost = [len(some) - count for some, count in zip(kept.values(), counts, strict=True)]
    said = "<p>Every step was judged on calibration tokens held out, and taken back where it lost.</p>"
    return said + drawn(lambda: [("steps kept and taken back", charts.bars("steps", list(kept), counts, lost))])


def _coverage(facts: dict[str, Any]) -> str:
    seen = [tensor for tensor in facts["tensors"] if "tokens" in tensor]
    if not seen:
        return "<p>None: the weights alone were read.</p>"
    least = sorted(seen, key=lambda tensor: tensor["tokens"])
    dropped = sum(tensor.get("dropped", 0) for tensor in seen)
    ends = [f"{tensor['tokens']:,}" for tensor in (least[0], least[-1])]
    said = f"<p>Each matrix saw {' to '.join(dict.fromkeys(ends))} tokens"
    said += f"; {dropped:,} rows of activations that were not finite were left out.</p>" if dropped else ".</p>"
    if "calibration_fit" in facts:
        said += f"<p>Calibration text: {escape(fitted(facts['calibration_fit']))}.</p>"
    few = [tensor for tensor in least if tensor["tokens"] < least[-1]["tokens"] / 4][:20]
    return said + table(["matrices that saw few tokens", "tokens"], [[t["name"], t["tokens"]] for t in few])


def _histograms(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for number, one in enumerate(facts.get("histograms", [])):
        svg = charts.histogram(f"histogram{number}", one["low"], one["high"], one["before"], one["after"])
        yield one["name"], svg


def _tuning(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"<p>{escape(tuned(found))}</p>" + table(["step", "KL on held-out tokens"], found["divergences"])


def _training(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"<p>{escape(learned(found))}</p>" + table(["step", "KL on held-out tokens"], found["divergences"])


def _verification(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    columns = {
        "weights": "weights off by",
        "error": "outputs off by",
        "bound": "at most",
        "drift": "with the blocks before",
    }
    rows = [
        [block["name"] or "outside", *("-" if block[key] is None else block[key] for key in columns)]
        for block in found["blocks"]
    ]
    return f"<p>{escape(verified(found))}</p>" + table(["block", *columns.values()], rows)


def _evaluation(measured: dict[str, Any] | None) -> str:
    if not measured:
        return ""
    flat = {key: value for key, value in measured.items() if isinstance(value, int | float)}
    for side in ("model", "reference"):
        if side in measured:
            flat[f"{side} perplexity"] = measured[side]["perplexity"]
    return table(["measure", "value"], [[key.replace("_", " "), value] for key, value in flat.items()])


def _all(facts: dict[str, Any]) -> str:
    rows = [
        [
            tensor["name"],
            "x".join(map(str, tensor["shape"])),
            tensor["format"],
            tensor["bits_per_weight"],
            percent(tensor.get("error")),
            percent(tensor.get("output_error")),
        ]
        for tensor in facts["tensors"]
    ]
    return table(["matrix", "shape", "format", "bits", "error", "output error"], rows)


def _settings(facts: dict[str, Any]) -> str:
    rows = [[key, json.dumps(value)] for key, value in facts["settings"].items()]
    rows += [[f"{name} version", version] for name, version in facts["versions"].items() if name != "llmquant"]
    return table(["setting", "value"], rows)
