"""Tables of levels: NF4, and whatever table the user names, with a scale per group.

    nf4:g64                       the levels of NormalFloat4
    nf4:g64:dq                    its scales quantized in turn: 8 bits for each, and a float32 for 256 of them
    table:-1,-0.4,0,0.3,1:g32     any 2 to 256 levels, ascending

Source: T. Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, section 3 and appendix E;
the levels and the 8-bit map are those of bitsandbytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.errors import PlanError
from llmquant.formats import clipping, options
from llmquant.formats.base import Granularity, Grid, TensorSpec
from llmquant.formats.elements import Element, Table
from llmquant.formats.scalar import Scalar

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FACTORS = [i / 50 for i in range(30, 58)]  # of the scale at which nothing clips
STRIDE = 3
NESTED = 256  # scales that share a scale in double quantization


@dataclass(frozen=True)
class Levels(Scalar):
    """table: the levels, ascending; name: nf4 or "table"."""

    name: str
    table: tuple[float, ...]
    granularity: Granularity = 64
    scale_dtype: torch.dtype | None = None

    @property
    def spec(self) -> str:
        levels = None if self.name == "nf4" else ",".join(repr(level) for level in self.table)
        return options.spec(self.name, levels, self.granularity, self.scale_dtype)

    @property
    def element(self) -> Element:
        return _element(self.table)

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        plain = self._store(x.abs().amax(-1) / self.element.largest)
        if clip == "minmax":
            return plain, None
        searches: list[tuple[clipping.Levels, list[float]]] = [
            (lambda factor: (self._store(plain * factor), None), FACTORS)
        ]
        if any(a != -b for a, b in zip(self.table, reversed(self.table), strict=True)):  # which end is which matters
            searches.append((lambda factor: (self._store(plain * -factor), None), FACTORS))
        return self._searched(x, importance, searches, STRIDE)


@dataclass(frozen=True)
class DoubleQuantized(Levels):
    """NF4 whose float32 scales, less their mean, are stored in 8 bits with a float32 for every 256, row after row.

    The grid's `outer` is the mean, followed by the float32s.
    """

    scale_dtype: torch.dtype | None = torch.float32

    @property
    def spec(self) -> str:
        return options.spec(self.name, self.granularity, "dq")

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        grid = super().fit(w, importance, clip=clip)
        mean = grid.scale.double().mean().float()
        apart = functional.pad((grid.scale.flatten() - mean), (0, -grid.scale.numel() % NESTED)).view(-1, NESTED)
        largest = apart.abs().amax(1)
        outer = torch.cat([mean.view(1), torch.where(largest == 0, 1.0, largest)])
        codes = self._nested_codes(grid.scale, outer)
        return replace(grid, scale=self._scales(codes, outer), outer=outer)

    def _nested_codes(self, scale: Tensor, outer: Tensor) -> Tensor:
        apart = (scale.double().flatten() - outer[0].double()) / _of_scales(outer, scale.numel()).double()
        return dynamic_map().codes(apart.float()).view(scale.shape)

    def _scales(self, codes: Tensor, outer: Tensor) -> Tensor:
        """Computed in float64 and rounded once, so that the codes can be found again from the scales."""
        levels = dynamic_map().levels(codes.flatten()).double()
        return (levels * _of_scales(outer, codes.numel()) + outer[0].double()).float().view(codes.shape)

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        """As it is: a scale of 8 bits is bound to those stored with it."""
        return grid.scale[:, group]

    # ---- the file

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        scales = self._scale_shape(shape)
        return {
            "weight_scale": TensorSpec(scales, torch.uint8),
            "weight_scale_scale": TensorSpec((1 + -(-math.prod(scales) // NESTED),), torch.float32),
        }

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        assert grid.outer is not None
        codes = self._nested_codes(grid.scale, grid.outer)
        return {"weight_scale": codes.reshape(self._scale_shape(shape)), "weight_scale_scale": grid.outer}

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        outer = named["weight_scale_scale"]
        scale = self._scales(self._two_dimensional(named["weight_scale"]), outer)
        return Grid(scale, None, self._group(shape[1]), outer=outer)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        scale = self._two_dimensional(named["weight_scale"])
        if scale.is_meta:
            return {"scale": torch.empty(scale.shape, device="meta")}
        return {"scale": self._scales(scale, named["weight_scale_scale"])}


def _of_scales(outer: Tensor, count: int) -> Tensor:
    """The float32 of every scale, flattened."""
    return outer[1:].repeat_interleave(NESTED)[:count]


@lru_cache(maxsize=16)
def _element(table: tuple[float, ...]) -> Table:
    """One for all uses of a table, which keeps what it looks up; but k-means learns a table for every weight."""
    return Table(table)


@cache
def dynamic_map() -> Table:
    """The 256 levels of the 8-bit dynamic map: 7 decades, the highest with 64 levels of either sign, the next with 32.

    Source: T. Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv:1511.04561, section 2.1.3.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
        levels += middles + [-middle for middle in middles]
    return Table(tuple(sorted(levels)))


def parse_nf4(name: str, tokens: list[str]) -> Levels:
    """`nf4`; g<columns> | channel | tensor; fp16 | bf16 | fp32 | dq."""
    words = (options.granularities("channel", "tensor"), options.scale_types(), {"dq": {"nested": True}})
    fields = options.read(name, tokens, *words)
    if fields.pop("nested", False):
        if "scale_dtype" in fields:
            raise PlanError("nf4: dq stores scales in 8 bits: leave out their type")
        return DoubleQuantized(name, NF4, **fields)
    return Levels(name, NF4, **fields)


def parse_table(name: str, tokens: list[str]) -> Levels:
    """`table`, the levels with commas between them, and the options of `nf4` but dq."""
    try:
        table = tuple(float(level) for level in tokens[0].split(",")) if tokens else ()
    except ValueError:
        raise PlanError(f"table:{tokens[0]}: levels are numbers with commas between them") from None
    ascending = all(a < b for a, b in pairwise(table))
    if not (2 <= len(table) <= 256 and ascending and all(math.isfinite(level) for level in table)):
        raise PlanError("table: give 2 to 256 finite levels in ascending order, as in table:-1,-0.4,0,0.3,1:g32")
    words = (options.granularities("channel", "tensor"), options.scale_types())
    return Levels(name, table, **options.read(name, tokens[1:], *words))
