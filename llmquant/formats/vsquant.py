"""VS-Quant: integers with a scale for every 16 columns that is itself an integer, times a scale of the row.

    x = q * k * s,  -(2**(bits - 1) - 1) <= q <= 2**(bits - 1) - 1,  0 <= k < 2**scale_bits

bits + scale_bits / 16 bits an element, and a scale of 16 or 32 bits a row.

Source: S. Dai et al., "VS-Quant: Per-Vector Scaled Quantization for Accurate Low-Precision Neural Network Inference",
MLSys 2021, arXiv:2102.04503, section 4. Unlike there, codes are found with the quantized scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.errors import PlanError
from llmquant.formats import clipping, options, packing
from llmquant.formats.base import Grid, TensorSpec, few_rows
from llmquant.formats.elements import Element, Whole
from llmquant.formats.scalar import REFINEMENTS, Scalar

VECTOR = 16
ROW_FACTORS = (1.0, 0.9, 0.8)  # of the row's scale; the vectors with the largest k clip
VECTOR_FACTORS = (1.0, 0.93, 0.86, 0.79, 0.72)  # of the plain scale of a vector


@dataclass(frozen=True)
class VSQuant(Scalar):
    """bits 3 to 8, scale_bits 4 to 6. The grid holds k * s of every vector, 0 for one of zeros, and s as `outer`."""

    bits: int
    scale_bits: int = 4
    scale_dtype: torch.dtype | None = None
    granularity = VECTOR
    fixed_group = True

    def __post_init__(self) -> None:
        if not (3 <= self.bits <= 8 and 4 <= self.scale_bits <= 6):
            raise PlanError(f"{self.spec}: elements have 3 to 8 bits, scales 4 to 6")

    @property
    def spec(self) -> str:
        return options.spec(f"vsq{self.bits}", f"s{self.scale_bits}", self.scale_dtype)

    @property
    def element(self) -> Element:
        top = 2 ** (self.bits - 1) - 1
        return Whole(self.bits, -top, top, "offset")

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """In float64: a scale that is a product puts more values next to a tie than float32 tells apart."""
        return super()._codes(x.double(), scale.double(), zero)

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        """See Format.fit. clip: `minmax` is the rule of the paper, `search` tries smaller scales of both kinds."""
        self._check(w, clip)
        rows, columns = w.shape
        h = None if importance is None else _in_vectors(importance.view(1, -1))
        found = []
        for some in few_rows(rows, columns, w.device):
            x = _in_vectors(w[some])  # zeros in a short vector change nothing
            found.append(self._plain(x) if clip == "minmax" else self._best(x, h))
        outer, whole = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._checked(Grid(outer * whole, None, VECTOR, outer=outer))

    def _plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (rows, vectors, 16) -> the row's scale (rows, 1) and the vectors' integers (rows, vectors), float32."""
        wanted = x.abs().amax(-1).double() / self.element.largest  # one rounding, that of the row's scale
        outer = wanted.amax(1, keepdim=True) / self._most
        stored = self._store(outer)
        vanished = stored != outer.to(self._stored_scale).float()  # so small that it was stored as 1
        return stored, self._whole(torch.where(vanished, 0, wanted), stored)

    @property
    def _most(self) -> int:
        return int(2**self.scale_bits - 1)

    def _whole(self, wanted: Tensor, outer: Tensor) -> Tensor:
        """At least 1, lest small vectors vanish, except for zeros."""
        return torch.where(wanted == 0, 0, (wanted / outer).round_().clamp_(1, self._most)).float()

    def _best(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        outer, whole = self._plain(x)
        wanted = x.abs().amax(-1) / self.element.largest * (whole > 0)
        loss = self._loss(x, h, outer, whole)
        start = outer
        for factor in ROW_FACTORS:
            new_outer = self._store(start * factor)
            new_whole, new_loss = self._best_vectors(x, h, new_outer, wanted)
            outer, whole, loss = _better((new_outer, new_whole, new_loss), (outer, whole, loss))
        for _ in range(REFINEMENTS):
            new_outer = self._refined_outer(x, h, outer, whole)
            new_whole, new_loss = self._best_vectors(x, h, new_outer, wanted)
            outer, whole, loss = _better((new_outer, new_whole, new_loss), (outer, whole, loss))
        return outer, whole

    def _best_vectors(self, x: Tensor, h: Tensor | None, outer: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        whole = self._whole(wanted, outer)
        loss = self._loss(x, h, outer, whole)
        for factor in VECTOR_FACTORS[1:]:
            new = self._whole(wanted * factor, outer)
            new_loss = self._loss(x, h, outer, new)
            better = new_loss < loss
            whole, loss = torch.where(better, new, whole), torch.where(better, new_loss, loss)
        return whole, loss

    def _loss(self, x: Tensor, h: Tensor | None, outer: Tensor, whole: Tensor) -> Tensor:
        return clipping.weighted_loss(self._error(x, outer * whole, None), h)

    def _refined_outer(self, x: Tensor, h: Tensor | None, outer: Tensor, whole: Tensor) -> Tensor:
        """Weighted least squares for the row's scale with all integers as they are."""
        steps = self._steps(x, (outer * whole).unsqueeze(-1), None).mul_(whole.unsqueeze(-1))
        weighted = steps if h is None else steps * h
        new = (weighted * x).sum((1, 2)) / (weighted * steps).sum((1, 2))
        new = new.unsqueeze(1)
        return self._store(torch.where(torch.isfinite(new) & (new > 0), new, outer))

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        assert grid.outer is not None
        outer = grid.outer.expand_as(grid.scale)[:, group]
        return outer * (scale / outer).round().clamp(1, self._most)

    def alternative(self, grid: Grid, which: int) -> tuple[int, Tensor] | None:
        """The next integer up, the next down."""
        if which > 1:
            return None
        assert grid.outer is not None
        whole = (grid.scale / grid.outer).round_()
        other = (whole + (1 if which == 0 else -1)).clamp_(1, self._most)
        return VECTOR, grid.outer * torch.where(whole == 0, 0, other)

    # ---- the file

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        vectors = self._stored_columns(shape[1]) // VECTOR
        return {
            "weight_scale": TensorSpec((shape[0], -(-vectors * self.scale_bits // 8)), torch.uint8),
            "weight_channel_scale": TensorSpec((shape[0], 1), self._stored_scale),
        }

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        assert grid.outer is not None
        whole = (grid.scale / grid.outer).round_().to(torch.uint8)
        return {
            "weight_scale": packing.pack_bits(whole, self.scale_bits),
            "weight_channel_scale": grid.outer.to(self._stored_scale),
        }

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        outer = named["weight_channel_scale"].float()
        return Grid(self._whole_scales(named, shape) * outer, None, VECTOR, outer=outer)

    def _whole_scales(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return packing.unpack_bits(named["weight_scale"], self.scale_bits, self._stored_columns(shape[1]) // VECTOR)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "levels": None,
            "zero": 2 ** (self.bits - 1),
            "scale": self._whole_scales(named, shape),
            "outer": named["weight_channel_scale"],
        }


def _in_vectors(x: Tensor) -> Tensor:
    return functional.pad(x, (0, -x.shape[1] % VECTOR)).unflatten(1, (-1, VECTOR))


def _better(new: tuple[Tensor, Tensor, Tensor], old: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row the (outer, whole, loss) whose vectors lose less in all."""
    wins = new[2].sum(1, keepdim=True) < old[2].sum(1, keepdim=True)
    return tuple(torch.where(wins, a, b) for a, b in zip(new, old, strict=True))  # type: ignore[return-value]


def parse(name: str, tokens: list[str]) -> VSQuant:
    """`vsq4`; s4 | s5 | s6, the bits of a vector's scale; fp16 | bf16 | fp32, the type of a row's."""
    scale_bits = {f"s{bits}": {"scale_bits": bits} for bits in (4, 5, 6)}
    vectors: options.Words = {"v16": {}}  # the one length there is may be named
    words = (scale_bits, vectors, options.scale_types())
    return VSQuant(int(name.removeprefix("vsq")), **options.read(name, tokens, *words, groups=False))
