"""Formats that give every element a code of its own: a level of an Element times the scale of the element's group.

A subclass says which element and which groups, and how a group's scale is found. Everything else is here: fitting,
encoding and decoding by pieces, and a file of two tensors, codes as dense bit streams and scales of 16 or 32 bits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import PlanError, ScaleOverflow
from llmquant.formats import clipping, packing
from llmquant.formats.base import Format, Granularity, Grid, Lattice, TensorSpec, check_finite, few_rows
from llmquant.formats.elements import Element
from llmquant.formats.options import SCALE_NAMES
from llmquant_kernels import PackedWeight

# Below this a stored scale is no longer a normal number (fp16: no longer any number) and the group is stored as zeros.
SMALLEST_SCALE = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
REFINEMENTS = 2
Found = tuple[Tensor, Tensor | None, Tensor]  # scale, zero, loss (rows, groups)


class Scalar(Format):
    """x = level(code) * scale. Subclasses are frozen dataclasses with the fields `granularity` and `scale_dtype`."""

    granularity: Granularity
    scale_dtype: torch.dtype | None  # None: float16, or bfloat16 for a bfloat16 weight
    clip_modes: tuple[str, ...] = ("search", "minmax")
    fixed_group = False  # the group is the format's own: a row may be shorter

    def __post_init__(self) -> None:
        if isinstance(self.granularity, int) and self.granularity < 1:
            raise PlanError(f"{self.spec}: a group has at least one column")

    @property
    @abstractmethod
    def element(self) -> Element:
        """What a code stands for, before scaling."""

    def _fit_groups(self, x: Tensor, importance: Tensor | None, clip: str) -> tuple[Tensor, Tensor | None]:
        """Stored scale and zero (rows, groups) for x (rows, groups, columns); importance broadcasts against x.

        For formats whose groups are fitted each by itself; the others override `fit`.
        """
        raise NotImplementedError

    def stored_for(self, dtype: torch.dtype) -> Format:
        if self.scale_dtype is not None:
            return self
        settled: Any = {"scale_dtype": torch.bfloat16 if dtype == torch.bfloat16 else torch.float16}
        return replace(self, **settled)  # type: ignore[type-var]  # subclasses are dataclasses

    @property
    def _stored_scale(self) -> torch.dtype:
        return self.scale_dtype or torch.float16

    def _store(self, scale: Tensor) -> Tensor:
        """Rounded to the stored type; scales that vanish there become 1, which turns their group into zeros."""
        stored = scale.to(self._stored_scale).float()
        return torch.where(stored.abs() < SMALLEST_SCALE[self._stored_scale], 1.0, stored)

    # ---- what a code means

    def _steps(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest levels, float32 in units of the scale, in a fresh tensor. scale and zero broadcast against x."""
        return self.element.round(_ratio(x, scale))

    def _values(self, steps: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What levels in units of the scale stand for; may overwrite steps."""
        return steps.mul_(scale)

    def _codes(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.element.codes(_ratio(x, scale))

    def _steps_of(self, codes: Tensor) -> Tensor:
        return self.element.levels(codes)

    # ---- fit

    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        """See Format.fit. clip: `search` for the least error, `minmax` for the format's plain rule."""
        return self._fit(w, importance, clip, partial(self._fit_groups, clip=clip))

    def _fit(
        self,
        w: Tensor,
        importance: Tensor | None,
        clip: str,
        fit_groups: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    ) -> Grid:
        self._check(w, clip)
        rows, columns = w.shape
        if self.granularity == "tensor":
            weights = None if importance is None else importance.expand(rows, columns).reshape(1, 1, -1)
            scale, zero = fit_groups(w.reshape(1, 1, -1), weights)
            return self._checked(Grid(scale, zero, columns))
        group = self._group(columns)
        empty = partial(torch.empty, rows, -(-columns // group), device=w.device)
        grid = Grid(empty(), empty() if self._has_zero else None, group)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            weights = None if importance is None else importance[columns].view(1, -1, width)
            found = fit_groups(w[rows, columns].unflatten(1, (-1, width)), weights)
            scale.squeeze(-1).copy_(found[0])
            if zero is not None and found[1] is not None:
                zero.squeeze(-1).copy_(found[1])

        grid.visit((rows, columns), run)
        return self._checked(grid)

    _has_zero = False

    def _check(self, w: Tensor, clip: str) -> None:
        if clip not in self.clip_modes:
            raise PlanError(f"clip mode {clip!r} is unknown to {self.spec}: choose one of {', '.join(self.clip_modes)}")
        check_finite(w)

    def _checked(self, grid: Grid) -> Grid:
        if not torch.isfinite(grid.scale).all():
            row, group = (~torch.isfinite(grid.scale)).nonzero()[0].tolist()
            wider: Any = {"scale_dtype": torch.float32}
            remedy = (
                "the weight is too large for this format"
                if self._stored_scale == torch.float32
                else f"store scales as fp32 (format {replace(self, **wider).spec})"  # type: ignore[type-var]
            )
            raise ScaleOverflow(
                f"the scale of row {row}, group {group} does not fit {SCALE_NAMES[self._stored_scale]}: {remedy}"
            )
        return grid

    def _searched(
        self,
        x: Tensor,
        importance: Tensor | None,
        searches: list[tuple[clipping.Levels, list[float]]],
        stride: int,
    ) -> tuple[Tensor, Tensor | None]:
        """The scale and zero of least weighted error over all searches, then refined by least squares."""
        scale, zero, loss = clipping.search(x, importance, *searches[0], self._error, stride=stride)
        for levels, factors in searches[1:]:
            other = clipping.search(x, importance, levels, factors, self._error, stride=stride)
            scale, zero, loss = better(other, (scale, zero, loss))
        for _ in range(REFINEMENTS):
            scale, zero, loss = better(self._refined(x, importance, scale, zero), (scale, zero, loss))
        return scale, zero

    def _least(self, x: Tensor, importance: Tensor | None, scales: Iterable[Tensor]) -> Tensor:
        """Group by group the scale of least weighted error, the first of equals."""
        best: Found | None = None
        for scale in scales:
            found = scale, None, clipping.weighted_loss(self._error(x, scale, None), importance)
            best = found if best is None else better(found, best)
        assert best is not None
        return best[0]

    def _error(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        scale, zero = scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1)
        return self._values(self._steps(x, scale, zero), scale, zero).sub_(x)

    def _refined(self, x: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor | None) -> Found:
        """The least-squares scale for the codes as they are, and its loss."""
        steps = self._steps(x, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1))
        if zero is not None:
            steps.sub_(zero.unsqueeze(-1))
        weighted = steps if importance is None else steps * importance
        new_scale = (weighted * x).sum(-1) / (weighted * steps).sum(-1)
        new_scale = self._store(torch.where(torch.isfinite(new_scale), new_scale, scale))
        return new_scale, zero, clipping.weighted_loss(self._error(x, new_scale, zero), importance)

    # ---- encode and decode

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        codes = torch.empty(w.shape, dtype=self.element.code_dtype, device=w.device)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            found = self._codes(w[rows, columns].unflatten(1, (-1, width)), scale, zero)
            codes[rows, columns] = found.flatten(1)

        grid.visit((w.shape[0], w.shape[1]), run)
        return codes

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        w = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)

        def run(rows: slice, columns: slice, width: int, scale: Tensor, zero: Tensor | None) -> None:
            steps = self._steps_of(codes[rows, columns]).unflatten(1, (-1, width))
            w[rows, columns] = self._values(steps, scale, zero).flatten(1)

        grid.visit((codes.shape[0], codes.shape[1]), run)
        return w

    def lattice(self, grid: Grid) -> Lattice:
        codes = self.element.all_codes().to(grid.scale.device)
        levels = self.element.levels(codes) + 0.0  # -0.0 and 0.0 are one level
        ascending = levels.argsort(stable=True)
        levels, codes = levels[ascending], codes[ascending]
        first = torch.nn.functional.pad(levels[1:] > levels[:-1], (1, 0), value=True)
        return Lattice(levels[first].view(1, -1), codes[first], grid.scale, grid.zero, None, grid.group)

    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        return self._store(scale)

    def moved(
        self, grid: Grid, *, scale: Tensor | None = None, zero: Tensor | None = None, levels: Tensor | None = None
    ) -> Grid:
        return grid if scale is None else replace(grid, scale=self.storable(scale, grid, slice(None)))

    # ---- the file

    def _group(self, columns: int) -> int:
        """Columns that share a scale."""
        return self.granularity if isinstance(self.granularity, int) else columns

    def _stored_columns(self, columns: int) -> int:
        """A short last group is stored whole."""
        group = self._group(columns)
        return -(-columns // group) * group

    def _scale_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        if self.granularity == "tensor":
            return (1,)
        return shape[0], self._stored_columns(shape[1]) // self._group(shape[1])

    def _check_group(self, columns: int) -> None:
        if isinstance(self.granularity, int) and self.granularity > columns and not self.fixed_group:
            raise PlanError(f"group {self.granularity} is larger than a row of {columns}: use at most g{columns}")

    def layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """`weight_packed` (out, bytes), `weight_scale` (out, groups); `weight_shape` where bytes do not tell it."""
        self._check_group(shape[1])
        return {**self._codes_layout(shape), **self._grid_layout(shape), **self._shape_layout(shape)}

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        shape = (codes.shape[0], codes.shape[1])
        named = {**self._pack_codes(self._padded(codes, grid)), **self._pack_grid(grid, shape)}
        return named | ({"weight_shape": torch.tensor(shape)} if self._shape_layout(shape) else {})

    def unpack(self, named: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        return self._unpack_codes(named, shape), self._unpack_grid(named, shape)

    def packed_weight(self, named: dict[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        fields: dict[str, Any] = {
            "packed": self._packed(named),
            "bits": self.element.bits,
            "shape": shape,
            "group": self._group(shape[1]),
            "levels": self.element.table().to(_device_of_values(self._packed(named))),
        }
        return PackedWeight(**fields | self._kernel_grid(named, shape))

    @staticmethod
    def _packed(named: dict[str, Tensor]) -> Tensor:
        return named["weight"].view(torch.uint8) if "weight" in named else named["weight_packed"]

    def _padded(self, codes: Tensor, grid: Grid) -> Tensor:
        """With the code of 0.0 in what is missing of the last group, as that group has it; values are never padded."""
        rows, columns = codes.shape
        missing = self._stored_columns(columns) - columns
        if not missing or self.element.cast is not None:
            return codes
        zeros = torch.zeros(rows, missing, device=codes.device)
        return torch.cat([codes, self.encode(zeros, grid.columns(columns, columns + missing))], dim=1)

    def weights_in(self, shapes: dict[str, tuple[int, ...]]) -> int:
        if "weight" in shapes:
            return math.prod(shapes["weight"])
        return math.prod(shapes["weight_packed"]) * 8 // self.element.bits

    # What a subclass with another file overrides.

    def _codes_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """`weight` (out, in) of torch's own type for the element, where there is one; else a dense bit stream."""
        if self.element.cast is not None:
            return {"weight": TensorSpec(shape, self.element.cast)}
        nbytes = -(-self._stored_columns(shape[1]) * self.element.bits // 8)
        return {"weight_packed": TensorSpec((shape[0], nbytes), torch.uint8)}

    def _shape_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        stored = {suffix: spec.shape for suffix, spec in self._codes_layout(shape).items()}
        told = self.weights_in(stored) == math.prod(shape)
        return {} if told else {"weight_shape": TensorSpec((2,), torch.int64)}

    def _pack_codes(self, codes: Tensor) -> dict[str, Tensor]:
        if self.element.cast is not None:
            return {"weight": codes.view(self.element.cast)}
        pieces = few_rows(codes.shape[0], codes.shape[1], codes.device)
        packed = [packing.pack_bits(self.element.stored(codes[some]), self.element.bits) for some in pieces]
        return {"weight_packed": torch.cat(packed)}

    def _unpack_codes(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        stored, bits = self._packed(named), self.element.bits
        if self.element.cast is not None:
            return stored
        pieces = few_rows(*shape, stored.device)
        return torch.cat([self.element.unstored(packing.unpack_bits(stored[some], bits, shape[1])) for some in pieces])

    def _grid_layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"weight_scale": TensorSpec(self._scale_shape(shape), self._stored_scale)}

    def _pack_grid(self, grid: Grid, shape: tuple[int, int]) -> dict[str, Tensor]:
        return {"weight_scale": grid.scale.to(self._stored_scale).reshape(self._scale_shape(shape))}

    def _unpack_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> Grid:
        return Grid(self._two_dimensional(named["weight_scale"]).float(), None, self._group(shape[1]))

    def _kernel_grid(self, named: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
        """The fields of PackedWeight that place the levels; those of `packed_weight` may be overridden."""
        return {"scale": self._two_dimensional(named["weight_scale"])}

    @staticmethod
    def _two_dimensional(scale: Tensor) -> Tensor:
        return scale.view(1, 1) if scale.dim() == 1 else scale


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """A scale of zero makes zeros of its group."""
    return x / torch.where(scale == 0, torch.inf, scale)


def _device_of_values(tensor: Tensor) -> torch.device:
    """Where a table goes that accompanies `tensor`: it keeps its values beside a tensor that has none."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def better(new: Found, old: Found) -> Found:
    """Group by group the one with less loss; the old where they are equal."""
    wins = new[2] < old[2]
    zero = old[1] if old[1] is None or new[1] is None else torch.where(wins, new[1], old[1])
    return torch.where(wins, new[0], old[0]), zero, torch.where(wins, new[2], old[2])
