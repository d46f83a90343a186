"""Scales that are moved from a norm, or a linear, into the columns of what reads it, so that rounding hurts less."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibration import Streams
from llmquant.equivalence import Place, in_place
from llmquant.formats import Format
from llmquant.phases import phase
from llmquant.ranks import Parcel
from llmquant.stages import Stage
from llmquant.stats import Stats, energy, finite_rows
from llmquant.swap import WeightSwap

WORTH = 0.95  # of the rounding error: where balance gains less, GPTQ makes more of the weights as they are
ALPHAS = 20  # powers of the activations' size that AWQ tries
WINDOWS = 16  # that it tries them on


class Scales:
    """What was moved in one block. The quantized stream sees it at once, the reference stream never.

    columns, rows: by which the columns (in,) and the rows (out,) of a target, by name, are multiplied.
    dense: the names in memory of other parameters that changed. notes: what was done, as JSON values.
    """

    def __init__(self, streams: Streams, block: int, swap: WeightSwap, places: list[Place]) -> None:
        self.streams, self.block, self.swap, self.places = streams, block, swap, places
        self.targets = streams.model.targets(block)
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.dense: list[str] = []
        self.notes: list[dict[str, Any]] = []

    def stored(self) -> dict[str, Tensor]:
        """What the checkpoint's own tensors become, by its names, but for the targets."""
        model = self.streams.model
        return {str(model.source_key(name)): self._stored(name, self.swap.pairs[name][2]) for name in self.dense}

    def _stored(self, name: str, value: Tensor) -> Tensor:
        """A parameter's value in the type that the file has."""
        key = self.streams.model.source_key(name)
        assert key is not None
        return value.to(self.streams.model.checkpoint.dtype(key)).cpu()

    def to_json(self) -> dict[str, Any]:
        """What is noted of it: `changed`, the names in memory of the parameters that are stored otherwise."""
        return {"scaled": self.notes, "changed": self.dense}

    def matrix(self, name: str) -> Tensor:
        """The matrix (out, in) of a target as it is to be quantized, float32."""
        target = self.targets[name]
        with self.swap.original():
            w = target.matrix(self.streams.model.module(target)).detach().float()
        if name in self.columns:
            w = w * self.columns[name]
        return w * self.rows[name][:, None] if name in self.rows else w

    def curvature(self, name: str, blocks: Tensor | None) -> Tensor | None:
        """G (blocks, b, b) of what a target puts out, whose rows may be scaled."""
        if blocks is None or name not in self.rows:
            return blocks
        count, width, _ = blocks.shape
        rows = self.rows[name].to(blocks.device)
        inverse = nn.functional.pad(1 / rows, (0, count * width - len(rows)), value=1.0).view(count, width)
        return blocks * inverse[:, :, None] * inverse[:, None, :]

    def move(self, place: Place, scale: Tensor, **note: Any) -> Tensor:
        """Divide the source's outputs by the scale (sources,) and multiply the readers' columns by it.

        The columns go by what the source's weight became in its own type. Returns their scale (in,).
        """
        model = self.streams.model
        divided = place.divided(model, scale)
        for name, value in divided.items():
            if name == f"{place.source}.weight" and place.offset is None:
                continue
            parameter = model.model.get_parameter(name)
            stored = self._stored(name, value).to(parameter)
            if place.offset is not None and name.endswith(".weight"):
                before, after = parameter.float() + place.offset, stored.float() + place.offset
                scale = torch.where(after != 0, before / after, scale)
            self.swap.replace(name, parameter, stored)
            self.dense.append(name)
        columns = place.columns(scale)
        for name in place.readers:
            self.columns[name] = self.columns.get(name, torch.ones_like(columns)) * columns
        if place.offset is None:
            self.rows[place.source] = self.rows.get(place.source, torch.ones_like(scale)) / scale
        for name in [*place.readers, *([place.source] if place.offset is None else [])]:
            parameter = model.module(self.targets[name]).get_parameter("weight")
            target = self.targets[name]
            self.swap.replace(target.parameter, parameter, target.stored(self.matrix(name)).to(parameter.dtype))
        self.notes.append({"source": place.source, "readers": list(place.readers), "offset": place.offset, **note})
        return columns


@phase("solve")
def balance(scales: Scales, place: Place, stats: Stats, formats: dict[str, Format]) -> Stats:
    """Give the readers' columns equal norms where plain rounding then loses clearly less of their outputs.

    What it undoes is a norm that multiplies some channels by much and weights that divide them by it again: in a group
    of columns that share a scale, those would all be rounded to zero. stats: of what the readers read; returns those of
    what they read then. formats: {reader: its format}.
    """
    weights = [scales.matrix(name) for name in place.readers]
    size = torch.cat(weights).square().mean(0).sqrt()
    scale = size.median() / size.clamp_min((1e-3 * size.median()).clamp_min(torch.finfo(torch.float32).tiny))
    before, after = (
        sum(_rounding_error(w, s, stats, formats[name]) for name, w in zip(place.readers, weights, strict=True))
        for s in (torch.ones_like(scale), scale)
    )
    if not after < WORTH * before:
        return stats
    return stats.scaled(scales.move(place, scale, rule="balance", error=after, before=before))


def _rounding_error(w: Tensor, scale: Tensor, stats: Stats, fmt: Format) -> float:
    """Of the outputs, relative, once w (out, in) is rounded with its columns multiplied by the scale (in,)."""
    error = _rounded(w, scale, fmt).sub_(w)
    return math.sqrt(stats.output_energy(error) / max(stats.output_energy(w), 1e-30))


def _rounded(w: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """w (out, in) after plain rounding over the whole range with its columns multiplied by the scale (in,)."""
    scaled = w * scale
    return fmt.decode(*fmt.quantize(scaled, clip="minmax")).div_(scale)


@phase("solve")
def awq(scales: Scales, place: Place, formats: dict[str, Format]) -> None:
    """Multiply columns by a power of the mean size of what they read, the one that harms what the readers make least.

    Source: J. Lin et al., "AWQ", arXiv:2306.00978, section 3.2. The powers are 0, 1/20 .. 19/20; they are judged by the
    outputs of the module that holds all readers, a single reader by its own, on the reference stream. formats: {reader:
    its format}.
    """
    weights = {name: scales.matrix(name) for name in place.readers}
    holder = _holder(list(weights))
    errors: list[list[float]] = []  # of every batch, for every power
    with scales.swap.original():
        size = _mean_size(scales, place)
        wanted = list(_outputs(scales, holder))
        for alpha in range(ALPHAS):
            columns = place.columns(_power(size, alpha / ALPHAS))
            rounded = {
                f"{name}.weight": scales.targets[name].stored(_rounded(w, columns, formats[name]))
                for name, w in weights.items()
            }
            with in_place(scales.streams.model, rounded):
                outputs = _outputs(scales, holder)
                errors.append([energy((a - b).float()) for a, b in zip(outputs, wanted, strict=True)])
    of_batches = scales.streams.ranks.interleaved(list(zip(*errors, strict=True)))
    errors_in_all = [sum(of_power) for of_power in zip(*of_batches, strict=True)]
    best = min(range(ALPHAS), key=errors_in_all.__getitem__)
    ratio = math.sqrt(errors_in_all[best] / errors_in_all[0]) if errors_in_all[0] else 1.0
    if best:
        scales.move(place, _power(size, best / ALPHAS), rule="awq", alpha=best / ALPHAS, error=ratio, before=1.0)


def _holder(names: list[str]) -> str:
    """The innermost module that holds all of these, which of a single one is itself."""
    levels = list(zip(*(name.split(".") for name in names), strict=False))
    depth = next((depth for depth, level in enumerate(levels) if len(set(level)) > 1), len(levels))
    return ".".join(level[0] for level in levels[:depth])


def _power(size: Tensor, alpha: float) -> Tensor:
    scale = size.pow(alpha).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def _mean_size(scales: Scales, place: Place) -> Tensor:
    """The mean of |x| (sources,) of what the readers read, over the calibration tokens of the reference stream."""
    streams = scales.streams
    stage = Stage([scales.targets[name] for name in place.readers])
    total = torch.zeros(len(place.rows), device=streams.model.device)

    def piece(i: int) -> Parcel:
        hidden, call = streams.reference[i], streams.calls[i][scales.block]
        x = None if streams.held[i] else streams.inputs(scales.block, stage, hidden, call)[0]
        if x is None:
            return Parcel()
        rows = x.flatten(0, -2).float()
        return Parcel(None, {"size": rows[finite_rows(rows)].abs().sum(0)})

    for _, parcel in streams.in_order(piece):
        if parcel.tensors:
            total += parcel.tensors["size"]
    rows = place.rows.to(total.device)
    return torch.zeros(place.sources, device=total.device).index_add_(0, rows, total) / rows.bincount()


def _outputs(scales: Scales, holder: str) -> Iterator[Tensor]:
    """What a module of the block puts out (tokens, size), for some batches of the reference stream."""
    streams = scales.streams
    parts = zip(streams.reference, streams.calls, streams.held, streams.numbers(), strict=True)
    for hidden, calls, held, numbers in parts:
        if not held and numbers[0] < WINDOWS:
            yield streams.output(scales.block, holder, hidden, calls[scales.block]).flatten(0, -2)
