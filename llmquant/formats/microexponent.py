"""Shared micro-exponents, MX9, MX6 and MX4: an exponent for 16 columns, lowered by one for pairs that are small.

    x = q * 2**(e - t - (m - 1)),  -2**m < q < 2**m,  m = 7, 4, 2

e is shared by a block of 16 (a byte), t by a pair (a bit), q is stored as sign and magnitude: m + 2 bits an element.
The plain rule: e is the largest floor(log2 |x|) of the block, t is 1 where that of the pair is lower. The search tries
e - 1, e and e + 1 and both t of every pair.

Source: B. Darvish Rouhani et al., "With Shared Microexponents, A Little Shifting Goes a Long Way", ISCA 2023,
arXiv:2302.08007. Not to be confused with the MX of OCP (mxfp4 and others), which came of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmquant.formats import options, packing
from llmquant.formats.base import Grid, TensorSpec, few_rows
from llmquant.formats.elements import Element, Whole
from llmquant.formats.scalar import Scalar

BLOCK = 16
PAIR = 2
MANTISSA = {"mx9": 7, "mx6": 4, "mx4": 2}


@dataclass(frozen=True)
class MicroExponent(Scalar):
    """name: mx9, mx6 or mx4. The grid has an entry for every pair; a zero marks the pairs of an all-zero block."""

    name: str
    granularity = PAIR
    fixed_group = True
    scale_dtype = torch.uint8

    @property
    def spec(self) -> str:
        return self.name

    @property
    def element(self) -> Element:
        top = 2**self._mantissa - 1
        return Whole(self._mantissa + 1, -top, top, "sign_magnitude")

    @property
    def _mantissa(self) -> int:
        return MANTISSA[self.name]

    @property
    def _unit(self) -> float:
        """The lowest bit of an element whose exponent is 0."""
        return float(2.0 ** (1 - self._mantissa))

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        self._check(w, clip)
        rows, columns = w.shape
        weights = None if importance is None else _in_blocks(importance.view(1, -1))
        scale = torch.empty(rows, -(-columns // PAIR), device=w.device)
        for some in few_rows(rows, columns, w.device):
            x = _in_blocks(w[some])  # zeros in a short block change nothing
            found = self._plain(x) if clip == "minmax" else self._best(x, weights)
            scale[some] = found.flatten(1)[:, : scale.shape[1]]
        return Grid(scale, None, PAIR)

    def _plain(self, x: Tensor) -> Tensor:
        """x (rows, blocks, 16) -> the scale of every pair, (rows, blocks, 8)."""
        shared, own = _exponents(x)
        return torch.where(own < shared, self._scale(shared) / 2, self._scale(shared))

    def _best(self, x: Tensor, importance: Tensor | None) -> Tensor:
        shared, own = _exponents(x)
        scales = [self._scale(shared + offset) for offset in (1, 0, -1, -2)]
        losses = [self._loss(x, scale, importance) for scale in scales]
        best = torch.where(own < shared, scales[2], scales[1])
        least = torch.where(own < shared, losses[2], losses[1]).sum(-1, keepdim=True)
        for (high, low), (at_high, at_low) in zip(pairwise(scales), pairwise(losses), strict=True):
            loss = torch.minimum(at_high, at_low).sum(-1, keepdim=True)
            better = loss < least
            best = torch.where(better, torch.where(at_low <= at_high, low, high), best)
            least = torch.where(better, loss, least)
        return best

    def _loss(self, x: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
        """Of every pair, (rows, blocks, 8), for the scale (rows, blocks, 1) of a block."""
        squares = self._error(x, scale.squeeze(-1), None).square_()
        first, second = _pairs(squares if importance is None else squares.mul_(importance))
        return first + second  # many times as fast as the sum over a dimension of two

    def _scale(self, shared: Tensor) -> Tensor:
        """The scale of pairs that are not lowered, for a block's exponent + 127; 0 where that is no byte above 0."""
        byte = shared.clamp(0, 254)
        return (byte << 23).view(torch.float32) * self._unit

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        """As it is: a pair's scale is bound to those of its block."""
        return grid.scale[:, group]

    def alternative(self, grid: Grid, which: int) -> tuple[int, Tensor] | None:
        """A block's exponent one up, one down; a pair's own the other way."""
        if which > 2:
            return None
        pairs = _in_blocks_of_pairs(grid.scale)
        shared = pairs.amax(-1, keepdim=True)
        if which == 2:
            return PAIR, torch.where(pairs == shared, shared / 2, shared).flatten(1)[:, : grid.scale.shape[1]]
        byte = shared.mul(1 / self._unit).view(torch.int32) >> 23
        other = pairs * 2 if which == 0 else pairs / 2
        # Halved once more for a lowered pair, it still is a normal number.
        allowed = (byte < 254) if which == 0 else (byte > 16)
        return BLOCK, torch.where(allowed, other, pairs).flatten(1)[:, : grid.scale.shape[1]]

    # ---- the file

    def _stored_columns(self, columns: int) -> int:
        return -(-columns // BLOCK) * BLOCK

    def _padded(self, codes: Tensor, grid: Grid) -> Tensor:
        return functional.pad(codes, (0, self._stored_columns(codes.shape[1]) - codes.shape[1]))

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        blocks = (shape[0], self._stored_columns(shape[1]) // BLOCK)
        return {
            "weight_scale": TensorSpec(blocks, torch.uint8),
            "weight_micro_exponent": TensorSpec(blocks, torch.uint8),
        }

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        scale = _in_blocks_of_pairs(grid.scale)
        shared = scale.amax(-1, keepdim=True)
        lowered = (scale < shared) | (scale == 0)
        byte = (shared.squeeze(-1) * (1 / self._unit)).view(torch.int32) >> 23
        return {
            "weight_scale": byte.to(torch.uint8),
            "weight_micro_exponent": packing.pack_bits(lowered.flatten(1).view(torch.uint8), 1),
        }

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        lowered = packing.unpack_bits(named["weight_micro_exponent"], 1, self._stored_columns(shape[1]) // PAIR)
        shared = self._scale(named["weight_scale"].int()).unsqueeze(-1)
        scale = torch.where(lowered.view(torch.bool).unflatten(1, (-1, BLOCK // PAIR)), shared / 2, shared)
        return Grid(scale.flatten(1)[:, : -(-shape[1] // PAIR)].contiguous(), None, PAIR)

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        return {
            "group": BLOCK,
            "scale": named["weight_scale"].view(torch.float8_e8m0fnu),
            "outer": torch.full((1, 1), self._unit, device=named["weight_scale"].device),
            "micro": named["weight_micro_exponent"],
        }


def _in_blocks(x: Tensor) -> Tensor:
    """(rows, columns) -> (rows, blocks, 16), with zeros for what a last block lacks."""
    return functional.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _in_blocks_of_pairs(scale: Tensor) -> Tensor:
    """Scales of pairs (rows, pairs) -> (rows, blocks, 8), with zeros for what a last block lacks."""
    return functional.pad(scale, (0, -scale.shape[1] % (BLOCK // PAIR))).unflatten(1, (-1, BLOCK // PAIR))


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second of every pair."""
    return x[..., ::PAIR], x[..., 1::PAIR]


def _exponents(x: Tensor) -> tuple[Tensor, Tensor]:
    """floor(log2 |x|) + 127 of blocks (rows, blocks, 1) and pairs (rows, blocks, 8), int32; 0 for subnormals too."""
    own = torch.maximum(*_pairs(x.abs())).view(torch.int32) >> 23
    return own.amax(-1, keepdim=True), own


def parse(name: str, tokens: list[str]) -> MicroExponent:
    """The name alone."""
    options.read(name, tokens, groups=False)
    return MicroExponent(name)
