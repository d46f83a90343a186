"""Pictures of figures as SVG, drawn by matplotlib: small, of equal width, with text that a page can resize."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmquant.exchange.extras import extra

WIDTH = 4.6  # inches: what a telephone shows without shrinking the text
INK, ACCENT, SECOND = "#1f2937", "#2563eb", "#d97706"


@contextmanager
def _axes(name: str, height: float) -> Iterator[tuple[Any, Any, list[str]]]:
    """Figure, axes, and a list that has the SVG at the end. name: sets this picture's ids apart from others'."""
    matplotlib = extra("matplotlib")
    figures = extra("matplotlib.figure")
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 8}
    style |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    drawn: list[str] = []
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        yield figure, axes, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        svg = buffer.getvalue()
        drawn.append(svg[svg.index("<svg") :])


def heat_map(name: str, rows: Sequence[str], values: Sequence[Sequence[float | None]], top: float | None) -> str:
    """values[row][block]; None where there is nothing. top: the colours go from 0 to this; None: as the values do."""
    with _axes(name, 1.0 + 0.24 * len(rows)) as (figure, axes, drawn):
        blocks = len(values[0])
        numbers = [[float("nan") if value is None else value for value in row] for row in values]
        shown = axes.pcolormesh(
            numbers, cmap="viridis", edgecolors="white", linewidth=0.6, vmin=None if top is None else 0, vmax=top
        )
        axes.set_yticks([place + 0.5 for place in range(len(rows))], rows)
        step = max(1, blocks // 8)
        axes.set_xticks([place + 0.5 for place in range(0, blocks, step)], range(0, blocks, step))
        axes.invert_yaxis()
        axes.set_xlabel("block")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(shown, ax=axes, pad=0.02)
    return drawn[0]


def bars(name: str, labels: Sequence[str], kept: Sequence[int], dropped: Sequence[int]) -> str:
    """How often each of the labels was kept, and how often taken back."""
    with _axes(name, 0.8 + 0.28 * len(labels)) as (_, axes, drawn):
        places = range(len(labels))
        axes.barh(places, kept, color=ACCENT, label="kept")
        axes.barh(places, dropped, left=kept, color=SECOND, label="taken back")
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel("matrices")
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return drawn[0]


def histogram(name: str, low: float, high: float, before: Sequence[int], after: Sequence[int]) -> str:
    """Counts of values between low and high, in equal bins."""
    with _axes(name, 2.3) as (_, axes, drawn):
        width = (high - low) / len(before)
        edges = [low + width * place for place in range(len(before) + 1)]
        axes.stairs(after, edges, fill=True, color=SECOND, alpha=0.55, label="quantized")
        axes.stairs(before, edges, color=ACCENT, label="original")
        axes.set_yscale("symlog", linthresh=10)
        axes.set_xlabel("weight")
        axes.set_ylabel("count")
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return drawn[0]


def front(name: str, points: Sequence[tuple[str, float, float]], best: Sequence[int], label: str) -> str:
    """(name, bits a weight, what is lost) of several models; best: those that no other beats, which a line joins."""
    with _axes(name, 3.2) as (_, axes, drawn):
        axes.plot(*zip(*[points[place][1:] for place in best], strict=True), color=SECOND, linewidth=1, zorder=1)
        axes.scatter([p[1] for p in points], [p[2] for p in points], color=ACCENT, s=18, zorder=2)
        for place, (text, bits, lost) in enumerate(sorted(points, key=lambda point: point[1])):
            away = (5, 5) if place % 2 else (-5, -11)  # neighbours on either side of the line
            side = "left" if place % 2 else "right"
            axes.annotate(text, (bits, lost), xytext=away, textcoords="offset points", fontsize=7, ha=side)
        axes.set_yscale("log")
        axes.margins(x=0.35, y=0.2)
        axes.set_xlabel("bits a quantized weight, metadata counted")
        axes.set_ylabel(label)
    return drawn[0]
