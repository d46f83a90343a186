"""NVFP4: e2m1 elements in blocks of 16, a block's scale in e4m3, and one float32 scale for the tensor.

    x = element * block scale * tensor scale

The tensor scale takes the largest magnitude to the largest element (6) times the largest block scale (448).

Source: NVIDIA, "Introducing NVFP4 for efficient and accurate low-precision inference" (2025). Tensors and bytes are
those of compressed-tensors, which stores one divided by the tensor scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import options
from llmquant.formats.base import Grid, TensorSpec
from llmquant.formats.elements import E2M1, E4M3, Element
from llmquant.formats.scalar import SMALLEST_SCALE, Scalar

BLOCK = 16
LARGEST_SCALE_CODE = 0x7E
ONE = 0x38
# The scale that puts a block's largest magnitude at 6, and those from 9 (it clips) to 3, in steps of the e4m3 code:
# a binade has eight.
SEARCHED = (*range(9), *range(-1, -6, -1))


@dataclass(frozen=True)
class NVFP4(Scalar):
    """clip: `search` tries for every block the 14 e4m3 scales about the plain one; `minmax` is the plain one."""

    granularity = BLOCK
    fixed_group = True
    scale_dtype = torch.float8_e4m3fn

    @property
    def spec(self) -> str:
        return "nvfp4"

    @property
    def compressed_tensors(self) -> str | None:
        return "nvfp4-pack-quantized"

    @property
    def element(self) -> Element:
        return E2M1

    def fit(
        self,
        w: Tensor,
        importance: Tensor | None = None,
        *,
        clip: str = "search",
        tensor_scale: float | None = None,
    ) -> Grid:
        """See Format.fit. tensor_scale: one that several tensors share, instead of the tensor's own."""
        self._check(w, clip)
        own = w.abs().amax() / (E4M3.largest * E2M1.largest)
        outer = _representable(own if tensor_scale is None else torch.full_like(own, tensor_scale)).view(1, 1)
        grid = self._fit(w, importance, clip, partial(self._fit_blocks, outer=outer, clip=clip))
        return replace(grid, outer=outer)

    def _fit_blocks(
        self, x: Tensor, importance: Tensor | None, *, outer: Tensor, clip: str
    ) -> tuple[Tensor, Tensor | None]:
        largest = x.abs().amax(-1)
        plain = E4M3.codes(largest / (E2M1.largest * outer)).clamp_min_(1)  # the smallest, lest a small block vanish
        plain = torch.where(largest == 0, ONE, plain).to(torch.int16)
        if clip == "minmax":
            return E4M3.levels(plain) * outer, None
        codes = ((plain + step).clamp_(1, LARGEST_SCALE_CODE) for step in SEARCHED)
        return self._least(x, importance, (E4M3.levels(code) * outer for code in codes)), None

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        assert grid.outer is not None
        outer = grid.outer.view(())
        return E4M3.levels(E4M3.codes(scale.abs() / outer).clamp_(min=1)) * outer

    def alternative(self, grid: Grid, which: int) -> tuple[int, Tensor] | None:
        """The next scale up, the next down."""
        if which > 1:
            return None
        assert grid.outer is not None
        code = E4M3.codes(grid.scale / grid.outer).to(torch.int16) + (1 if which == 0 else -1)
        return BLOCK, E4M3.levels(code.clamp_(1, LARGEST_SCALE_CODE)) * grid.outer

    # ---- the file

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {
            "weight_scale": TensorSpec(self._scale_shape(shape), torch.float8_e4m3fn),
            "weight_global_scale": TensorSpec((1,), torch.float32),
        }

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        assert grid.outer is not None
        return {
            "weight_scale": (grid.scale / grid.outer).to(torch.float8_e4m3fn),
            "weight_global_scale": (1 / grid.outer).view(1),
        }

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        outer = _outer(named)
        return Grid(named["weight_scale"].float() * outer, None, BLOCK, outer=outer)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {"scale": named["weight_scale"], "outer": _outer(named)}


def _outer(named: dict[str, Tensor]) -> Tensor:
    return (1 / named["weight_global_scale"]).view(1, 1)


def _representable(scale: Tensor) -> Tensor:
    """The nearest tensor scale that is one divided by a float32, since that is what the file has."""
    scale = torch.where(scale < SMALLEST_SCALE[torch.float32], 1.0, scale)
    return 1 / (1 / scale)


def parse(name: str, tokens: list[str]) -> NVFP4:
    """The name alone."""
    options.read(name, tokens, groups=False)
    return NVFP4()
