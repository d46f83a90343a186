"""k-means: levels learned from the weight itself, for each row, for the tensor, or shared by groups that have scales.

    kmeans4:channel     a table of 16 levels for each row; the default
    kmeans4:tensor      one table
    kmeans4:g64         one table, and a scale for each group of 64 columns

Source: S. Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", arXiv:2306.07629, section 4.1, where the importance
of a weight is the diagonal of the Fisher information.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmquant.formats import clustering, options
from llmquant.formats.base import PIECE, Granularity, Grid, Lattice, TensorSpec
from llmquant.formats.elements import Element, Whole
from llmquant.formats.scalar import Scalar
from llmquant.formats.table import Levels

ROUNDS = 2  # of fitting the scales to the shared table and the table to the scales


@dataclass(frozen=True)
class KMeans(Scalar):
    """2**bits levels. Codes are places in the table, uint8; a tie goes to the lower level. clip changes nothing."""

    bits: int
    granularity: Granularity = "channel"
    scale_dtype: torch.dtype | None = None

    @property
    def spec(self) -> str:
        return options.spec(f"kmeans{self.bits}", self.granularity, self.scale_dtype)

    @property
    def element(self) -> Element:
        """Only how codes are stored: the levels are the grid's."""
        return Whole(self.bits, 0, 2**self.bits - 1, "unsigned")

    @property
    def _grouped(self) -> bool:
        return isinstance(self.granularity, int)

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        self._check(w, clip)
        if self._grouped:
            return self._fit_shared(w, importance)
        rows, columns = w.shape
        if self.granularity == "tensor":
            h = None if importance is None else importance.expand(rows, columns).reshape(1, -1)
            levels = clustering.levels_of_histogram(w.reshape(1, -1), h, 2**self.bits)
        else:
            step = max(1, 2 * PIECE // columns)
            pieces = [clustering.levels(part, importance, 2**self.bits) for part in w.split(step)]
            levels = torch.cat(pieces)
        grid = Grid(torch.ones(1, 1, device=w.device), None, columns)
        return replace(grid, levels=self._stored_levels(levels))

    def _fit_shared(self, w: Tensor, importance: Tensor | None) -> Grid:
        """In turn the table for the scales and the scales for the table, from the scales of the largest magnitudes."""
        scale = Levels("table", (-1.0, 1.0), self.granularity, self._stored_scale)
        grid = scale.fit(w, clip="minmax")
        table = torch.zeros(1, 2**self.bits)
        groups = torch.arange(w.shape[1], device=w.device) // grid.group
        for _ in range(ROUNDS):
            spread = grid.scale[:, groups]
            h = spread.square() if importance is None else spread.square() * importance
            table = self._stored_levels(
                clustering.levels_of_histogram((w / spread).view(1, -1), h.view(1, -1), 2**self.bits)
            )
            grid = self._with_table(table).fit(w, importance)
        return replace(grid, levels=table)

    def _stored_levels(self, levels: Tensor) -> Tensor:
        return self._checked(Grid(levels.to(self._stored_scale).float(), None, 1)).scale

    def _with_table(self, levels: Tensor) -> Levels:
        return Levels("table", tuple(levels.flatten().tolist()), self.granularity, self._stored_scale)

    # ---- encode and decode

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        assert grid.levels is not None
        if self._grouped or len(grid.levels) == 1:
            return self._with_table(grid.levels).encode(w, grid)
        levels = grid.levels.double()
        middles = ((levels[:, 1:] + levels[:, :-1]) / 2).float()
        return torch.searchsorted(middles, w.contiguous(), out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        assert grid.levels is not None
        if self._grouped or len(grid.levels) == 1:
            return self._with_table(grid.levels).decode(codes, grid)
        pieces = zip(grid.levels.split(256), codes.split(256), strict=True)
        return torch.cat([levels.gather(1, part.long()) for levels, part in pieces])

    def lattice(self, grid: Grid) -> Lattice:
        assert grid.levels is not None
        return replace(super().lattice(grid), levels=grid.levels)

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        return super().storable(scale, grid, group) if self._grouped else grid.scale[:, group]

    def moved(
        self, grid: Grid, *, scale: Tensor | None = None, zero: Tensor | None = None, levels: Tensor | None = None
    ) -> Grid:
        grid = super().moved(grid, scale=scale)
        return grid if levels is None else replace(grid, levels=self._stored_levels(levels))

    # ---- the file

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        tables = shape[0] if self.granularity == "channel" else 1
        specs = {"weight_codebook": TensorSpec((tables, 2**self.bits), self._stored_scale)}
        return specs | (super()._grid_layout(shape) if self._grouped else {})

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        assert grid.levels is not None
        named = {"weight_codebook": grid.levels.to(self._stored_scale)}
        return named | (super()._pack_grid(grid, shape) if self._grouped else {})

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        levels = named["weight_codebook"].float()
        if self._grouped:
            return replace(super()._unpack_grid(named, shape), levels=levels)
        return Grid(torch.ones(1, 1, device=levels.device), None, shape[1], levels=levels)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        levels = named["weight_codebook"]
        levels = levels.view(-1) if len(levels) == 1 else levels
        one = torch.ones(1, 1, device=levels.device)
        return {"levels": levels, "scale": named["weight_scale"] if self._grouped else one}


def parse(name: str, tokens: list[str]) -> KMeans:
    """`kmeans4`; channel | tensor | g<columns>; fp16 | bf16 | fp32, the type of levels and scales."""
    words = (options.granularities("channel", "tensor"), options.scale_types())
    return KMeans(int(name.removeprefix("kmeans")), **options.read(name, tokens, *words))
