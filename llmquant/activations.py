"""Activations in integers, to see what they would cost: nothing is faster, the numbers are those of such a product.

Before every product of a quantized linear layer its inputs are rounded to b-bit integers times a scale, and taken back:

dynamic         a scale for every token, from the token itself: max|x| / (2**(b-1) - 1)
dynamic:asym    with a zero point: the range of the token, zero included, over 2**b levels
static          one scale for every layer, from text that is shown before; what lies beyond is clipped. How far it
                reaches is said by an observer: minmax, the largest magnitude; percentile, what 99.99 % stay below;
                mse, the least squared error; kl, the nearest histogram of magnitudes by KL (S. Migacz, "8-bit
                inference with TensorRT", GTC 2017)

Observers see a histogram of magnitudes of 2048 bins up to the largest, which takes two passes over the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import NonFiniteInput, PlanError
from llmquant.formats.clipping import HISTOGRAM_BINS, coarsening_divergence
from llmquant.hooks import hooked
from llmquant.linear import QuantExperts, QuantLinear

OBSERVERS = ("minmax", "percentile", "mse", "kl")
PERCENTILE = 0.9999
STRIDE = 16  # bins from one threshold that is tried to the next


@dataclass(frozen=True)
class Activations:
    """bits 2 to 8; mode dynamic or static; observer: of static ones; asym: of dynamic ones."""

    bits: int
    mode: str
    observer: str = "minmax"
    asym: bool = False

    @classmethod
    def parse(cls, spec: str) -> Activations:
        """`int8:dynamic`, `int8:dynamic:asym`, `int8:static` or `int8:static:mse`. Raises PlanError."""
        name, _, rest = spec.partition(":")
        mode, _, option = rest.partition(":")
        digits = name.removeprefix("int")
        known = {"dynamic": ("", "asym"), "static": ("", *OBSERVERS)}
        if name != f"int{digits}" or digits not in tuple("2345678") or option not in known.get(mode, ()):
            raise PlanError(
                f"activations {spec!r} are unknown: int8 (or 2 to 7 bits) with :dynamic, :dynamic:asym, or :static "
                f"with one of {', '.join(OBSERVERS)} after another colon"
            )
        if mode == "static":
            return cls(int(digits), mode, option or "minmax")
        return cls(int(digits), mode, asym=option == "asym")

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative."""
        return int(2 ** (self.bits - 1) - 1)

    # ---- what is computed

    def per_token(self, x: Tensor) -> Tensor:
        """x (..., in), each row rounded on its own scale; in x's type. Raises NonFiniteInput."""
        wide = x.float()
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise NonFiniteInput("activations hold NaN or Inf, which no integer is")
        if not self.asym:
            return round_to(wide, torch.maximum(high, -low) / self.top, self.top).to(x.dtype)
        low, high = low.clamp(max=0), high.clamp(min=0)
        levels = 2 * self.top + 1
        scale = _usable((high - low) / levels)
        zero = (-low / scale).round()
        return (((wide / scale).round() + zero).clamp(0, levels) - zero).mul(scale).to(x.dtype)

    def threshold(self, counts: Tensor, largest: float) -> float:
        """How far a static scale reaches, given counts (2048,) of magnitudes in equal bins up to `largest`."""
        if self.observer == "minmax" or largest == 0:
            return largest
        width = largest / HISTOGRAM_BINS
        if self.observer == "percentile":
            share = counts.double().cumsum(0) / counts.sum(dtype=torch.float64)
            return (int((share < PERCENTILE).sum()) + 1) * width
        loss = self._squared_error if self.observer == "mse" else self._divergence
        stops = range(max(self.top + 1, STRIDE), HISTOGRAM_BINS + 1, STRIDE)
        return min(stops, key=lambda stop: loss(counts, stop)) * width

    def _squared_error(self, counts: Tensor, stop: int) -> float:
        """Of the middles of all bins, with the range that ends with bin `stop`, in bins."""
        middles = torch.arange(HISTOGRAM_BINS, dtype=torch.float64) + 0.5
        scale = torch.tensor(stop / self.top, dtype=torch.float64)
        return float((counts.double() * (round_to(middles, scale, self.top) - middles).square()).sum())

    def _divergence(self, counts: Tensor, stop: int) -> float:
        return float(coarsening_divergence(counts, stop, self.top + 1))


def round_to(x: Tensor, scale: Tensor, top: int) -> Tensor:
    """The nearest multiples of the scale, ties to even, from -top to top times it."""
    scale = _usable(scale)
    return (x / scale).round().clamp(-top, top).mul(scale)


def _usable(scale: Tensor) -> Tensor:
    """Of zeros alone any scale makes zeros."""
    return torch.where(scale > 0, scale, 1.0)


@contextmanager
def rounded(model: nn.Module, activations: Activations, windows: Tensor | None = None) -> Iterator[int]:
    """The model with its quantized linear layers fed with rounded activations. Gives how many layers these are.

    windows (n, length) int64: what a static range is found on. Raises PlanError where there is nothing to round, or
    where it is not seen what layers are fed with.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    experts = next((name for name, layer in model.named_modules() if isinstance(layer, QuantExperts)), None)
    if experts is not None:
        raise PlanError(f"{experts}: the tokens sent to experts are not seen one matrix at a time: no figure for them")
    if not layers:
        raise PlanError("the model has no quantized linear layer: give a folder of llmquant's, such as int8:channel")
    if activations.mode == "dynamic":
        feeds: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(layers, activations.per_token)
    elif windows is None:
        raise PlanError("static activations need text that their range is found on: give --calibration")
    else:
        feeds = {
            name: partial(_clipped, reach / activations.top, activations.top)
            for name, reach in thresholds(model, layers, activations, windows).items()
        }

    def feed(name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            return (feeds[name](args[0]), *args[1:])
        except NonFiniteInput as error:
            raise NonFiniteInput(f"{name}: {error}") from None

    handles = [layer.register_forward_pre_hook(partial(feed, name)) for name, layer in layers.items()]
    with hooked(*handles):
        yield len(layers)


def _clipped(scale: float, top: int, x: Tensor) -> Tensor:
    return round_to(x.float(), torch.tensor(scale, device=x.device), top).to(x.dtype)


@torch.no_grad()
def thresholds(
    model: nn.Module, layers: dict[str, QuantLinear], activations: Activations, windows: Tensor
) -> dict[str, float]:
    """How far the range of each layer's inputs reaches, by text (n, length) int64 that the model is shown."""
    largest = dict.fromkeys(layers, 0.0)
    counts = {name: torch.zeros(HISTOGRAM_BINS) for name in layers}

    def reach(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        found = float(args[0].float().abs().amax())
        if not found < float("inf"):
            raise NonFiniteInput(f"{name}: activations hold NaN or Inf: nothing can be said of their range")
        largest[name] = max(largest[name], found)

    def count(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        magnitudes = args[0].float().abs()
        counts[name] += torch.histc(magnitudes, HISTOGRAM_BINS, 0, largest[name] or 1.0).cpu()

    for see in (reach,) if activations.observer == "minmax" else (reach, count):
        handles = [layer.register_forward_pre_hook(partial(see, name)) for name, layer in layers.items()]
        with hooked(*handles):
            for window in windows.split(1):
                model(input_ids=window.to(next(model.parameters()).device), use_cache=False)
    return {name: activations.threshold(counts[name], largest[name]) for name in layers}
