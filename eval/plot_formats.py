"""Signal to noise against bits per weight of every format, as a picture.

python eval/plot_formats.py docs/formats.svg
"""

from __future__ import annotations

import argparse

from llmquant import format_table

FAMILIES = {  # beginning of the name -> how the picture calls the family
    "int": "integer",
    "mxfp": "OCP MX",
    "mxint": "OCP MX",
    "mx": "micro-exponents",
    "nvfp4": "NVFP4",
    "vsq": "VS-Quant",
    "fp8": "FP8",
    "nf4": "NF4",
    "kmeans": "k-means",
    "ternary": "ternary, binary",
    "binary": "ternary, binary",
}
MARKERS = "osD^vP*X<"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="the file to write: .svg or .png")
    path = parser.parse_args().picture
    try:
        import matplotlib
    except ImportError:
        parser.error("needs matplotlib: pip install 'llmquant[plot]'")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "llmquant"  # the same picture, the same bytes
    from matplotlib import pyplot

    rows = list(format_table.measure())
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 7), sharey=True, layout="constrained")
    for panel, (field, title) in zip(axes, (("normal", "normal"), ("student_t5", "Student t, 5 degrees")), strict=True):
        for marker, family in zip(MARKERS, dict.fromkeys(FAMILIES.values()), strict=True):
            some = [row for row in rows if _family(row.format) == family]
            bits = [row.bits_per_weight[0] for row in some]
            panel.plot(bits, [getattr(row, field) for row in some], marker, label=family, alpha=0.8)
        best = _front([(row.bits_per_weight[0], getattr(row, field), row.format) for row in rows])
        panel.plot(*zip(*((width, decibels) for width, decibels, _ in best), strict=True), color="0.7", zorder=0)
        labelled = (0.0, 0.0)
        for width, decibels, name in best:
            if width - labelled[0] > 0.2 or decibels - labelled[1] > 1.3:  # else the names would overlap
                panel.annotate(name, (width, decibels), (-4, 4), textcoords="offset points", ha="right", fontsize=7)
                labelled = width, decibels
        panel.set(title=f"{title} weights", xlabel="bits per weight, all metadata counted (4096 x 4096)")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("signal to noise, dB (no calibration)")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _family(name: str) -> str:
    return next(family for start, family in FAMILIES.items() if name.startswith(start))


def _front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Those that no other beats with as few bits."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


if __name__ == "__main__":
    main()
