"""Ternary: -1, 0 and 1 with a scale per group, five codes in a byte: 1.6 bits an element.

opt       the scale of least weighted squared error, exactly; the default
twn       T. Li et al., "Ternary Weight Networks", arXiv:1605.04711, section 2.3: |x| > 0.7 mean|x| are kept
absmean   S. Ma et al., "The Era of 1-bit LLMs" (BitNet b1.58), arXiv:2402.17764, section 2: s = mean|x|, meant for
          training with it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import options, packing
from llmquant.formats.base import Granularity, Grid, TensorSpec
from llmquant.formats.elements import Element, Whole
from llmquant.formats.scalar import Scalar

RULES = ("opt", "twn", "absmean")


@dataclass(frozen=True)
class Ternary(Scalar):
    """rule: how the scale is found; clip `minmax` changes nothing, no rule looks at the range."""

    granularity: Granularity = 128
    rule: str = "opt"
    scale_dtype: torch.dtype | None = None

    @property
    def spec(self) -> str:
        return options.spec("ternary", self.granularity, None if self.rule == "opt" else self.rule, self.scale_dtype)

    @property
    def element(self) -> Element:
        return Whole(2, -1, 1, "offset")

    def _store(self, scale: Tensor) -> Tensor:
        """A scale that is stored as zero makes zeros of its group."""
        return scale.to(self._stored_scale).float()

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        magnitude = x.abs()
        if self.rule == "absmean":
            return self._store(magnitude.mean(-1, dtype=torch.float64).clamp_min(1e-5)), None
        if self.rule == "twn":
            kept = magnitude > _threshold(magnitude)
            scale = (magnitude * kept).sum(-1, dtype=torch.float64) / kept.sum(-1)
        else:
            scale = _least_squares(magnitude, importance)
        return self._store(torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)), None

    def quantize(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> tuple[Tensor, Grid]:
        """Fit, then encode; `twn` keeps what its threshold keeps, which are not always the nearest levels."""
        grid = self.fit(w, importance, clip=clip)
        if self.rule != "twn":
            return self.encode(w, grid), grid
        # On a grid of twice the threshold, what exceeds the threshold is nearer to 1 than to 0.
        twice = self._fit(w, None, clip, lambda x, _: (2 * _threshold(x.abs()).squeeze(-1), None))
        return self.encode(w, twice), grid

    # ---- the file

    def _codes_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"weight_packed": TensorSpec((shape[0], -(-shape[1] // packing.TRITS)), torch.uint8)}

    def weights_in(self, shapes: dict[str, tuple[int, ...]]) -> int:
        return math.prod(shapes["weight_packed"]) * packing.TRITS

    def _padded(self, codes: Tensor, grid: Grid) -> Tensor:
        return codes

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        return {"weight_packed": packing.pack_trits((codes + 1).view(torch.uint8))}

    def _unpack_codes(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return packing.unpack_trits(named["weight_packed"], shape[1]).view(torch.int8) - 1

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {**super()._kernel_grid(named, shape), "levels": None, "zero": 1, "trits": True}


def _threshold(magnitude: Tensor) -> Tensor:
    return 0.7 * magnitude.mean(-1, keepdim=True)


def _least_squares(magnitude: Tensor, importance: Tensor | None) -> Tensor:
    """The best scale keeps the largest magnitudes, however many, and is their mean: so all counts are tried."""
    ordered, place = magnitude.sort(dim=-1, descending=True)
    if importance is None:
        weight = torch.ones_like(ordered).cumsum(-1)
        total = ordered.double().cumsum(-1)
    else:
        h = importance.expand_as(magnitude).gather(-1, place).double()
        weight, total = h.cumsum(-1), (h * ordered).cumsum(-1)
    gain = torch.nan_to_num(total.square() / weight)  # what keeping them takes off the squared error
    best = gain.argmax(-1, keepdim=True)
    return (total.gather(-1, best) / weight.gather(-1, best)).squeeze(-1)


def parse(name: str, tokens: list[str]) -> Ternary:
    """`ternary`; g<columns> | channel | tensor; a rule; fp16 | bf16 | fp32."""
    rules = {rule: {"rule": rule} for rule in RULES}
    words = (options.granularities("channel", "tensor"), rules, options.scale_types())
    return Ternary(**options.read(name, tokens, *words))
