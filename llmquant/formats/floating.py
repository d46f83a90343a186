"""FP8: e4m3 or e5m2 elements with a scale per tensor, row, group of columns or block of 128 x 128.

    x = element * s,  s = max|x| / largest element

Source: P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; blocks of 128 x 128 as in
DeepSeek-V3, arXiv:2412.19437, section 3.3. Tensors and bytes are those of compressed-tensors. e5m2 has one bit of
mantissa less for a range that weights do not need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.formats import options
from llmquant.formats.base import Granularity, Grid
from llmquant.formats.elements import E4M3, E5M2, Float
from llmquant.formats.scalar import Scalar

ELEMENTS = {"fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
SIDE = 128  # of a block
# Of a scale with which nothing clips: within a binade, since two binades differ in nothing but the smallest levels.
FACTORS = [1 + i / 16 for i in range(16)]


@dataclass(frozen=True)
class FP8(Scalar):
    """name: a key of ELEMENTS; granularity: "channel", "tensor", "block" (128 x 128) or a number of columns."""

    name: str
    granularity: Granularity = "channel"
    scale_dtype: torch.dtype | None = torch.float32

    @property
    def spec(self) -> str:
        scale = None if self.scale_dtype == torch.float32 else self.scale_dtype
        return options.spec(self.name, self.granularity, scale)

    @property
    def compressed_tensors(self) -> str | None:
        return "float-quantized" if self.name == "fp8_e4m3" and not isinstance(self.granularity, int) else None

    @property
    def element(self) -> Float:
        return ELEMENTS[self.name]

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        if self.granularity != "block":
            return super().fit(w, importance, clip=clip)
        self._check(w, clip)
        rows = w.shape[0]
        weights = None if importance is None else _padded(importance.view(1, -1))[0].view(1, -1, 1, SIDE)
        scales = []
        for start in range(0, rows, SIDE):
            # Zeros fill the last block: they neither move its scale nor add to its error.
            x = _padded(w[start : start + SIDE]).unflatten(1, (-1, SIDE)).transpose(0, 1).flatten(1).unsqueeze(0)
            h = None if weights is None else weights.expand(1, -1, x.shape[2] // SIDE, SIDE).flatten(2)
            scales.append(self._fit_groups(x, h, clip)[0].expand(min(SIDE, rows - start), -1))
        return self._checked(Grid(torch.cat(scales), None, SIDE))

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        plain = self._store(x.abs().amax(-1) / self.element.largest)
        if clip == "minmax":
            return plain, None
        return self._searched(x, importance, [(lambda factor: (self._store(plain * factor), None), FACTORS)], 4)

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        """As it is in a block, whose rows share one."""
        return grid.scale[:, group] if self.granularity == "block" else super().storable(scale, grid, group)

    # ---- the file

    def _group(self, columns: int) -> int:
        return SIDE if self.granularity == "block" else super()._group(columns)

    def _scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        if self.granularity == "block":
            return -(-shape[0] // SIDE), -(-shape[1] // SIDE)
        return super()._scale_shape(shape)

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        if self.granularity == "block":
            return {"weight_scale": grid.scale[::SIDE].to(self._stored_scale).contiguous()}
        return super()._pack_grid(grid, shape)

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        grid = super()._unpack_grid(named, shape)
        return replace(grid, scale=_of_rows(grid.scale, shape[0])) if self.granularity == "block" else grid

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        fields = super()._kernel_grid(named, shape)
        return {"scale": _of_rows(fields["scale"], shape[0])} if self.granularity == "block" else fields


def _padded(x: Tensor) -> Tensor:
    return functional.pad(x, (0, -x.shape[1] % SIDE))


def _of_rows(scale: Tensor, rows: int) -> Tensor:
    """(blocks of rows, groups) -> (rows, groups)"""
    return scale.repeat_interleave(SIDE, dim=0)[:rows]


def parse(name: str, tokens: list[str]) -> FP8:
    """`fp8_e4m3` or `fp8_e5m2`; channel | tensor | block | g<columns>; fp32 | bf16 | fp16."""
    words = (options.granularities("channel", "tensor", "block"), options.scale_types())
    return FP8(name, **options.read(name, tokens, *words))
