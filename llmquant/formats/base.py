"""The contract of a number format: what its codes mean, where its levels sit, and how both lie in a file.

A weight is a matrix (out, in). A format's codes have the same shape; its Grid says, for every group of columns of a
row, where the levels sit. Everything a solver asks is here: fit a grid, encode and decode the whole matrix or any run
of its columns, pack and unpack.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmquant.errors import NonFiniteInput
from llmquant_kernels import Facts, PackedWeight

# Elements that are worked on at a time on a CPU: a megabyte of float32, which stays in cache through the many passes of
# a range search. On two cores with 2 MB of cache each, a search of a 2048x5632 weight takes 0.65, 0.44, 0.54 and 0.59 s
# with 2**17, 2**18, 2**19 and 2**20; threads of our own over smaller pieces gain nothing, for want of the interpreter.
PIECE = 2**18


def few_rows(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """All rows of a matrix (rows, columns), on a CPU a few at a time, which stay in cache from step to step."""
    step = max(1, PIECE // max(1, columns)) if device.type == "cpu" else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# visit calls it with rows, columns, columns a group, scale and zero.
Visitor = Callable[[slice, slice, int, Tensor, Tensor | None], None]
Granularity = int | str  # columns that share a scale, or "channel" (one scale per row), or "tensor" (one for all)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one stored tensor, known before any weight exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Grid:
    """Where the levels of one weight sit. Values are float32, and exactly what the file can hold."""

    scale: Tensor  # (out or 1, groups): what a level is multiplied with, all levels of scaling together
    zero: Tensor | None  # (out or 1, groups), in the unit its format says; None: zero
    group: int  # columns that share an entry
    start: int = 0  # columns of the first group that lie left of this grid
    outer: Tensor | None = None  # the scale of the scales, where a format has one; its shape is the format's affair
    levels: Tensor | None = None  # (out or 1, levels), ascending: the codebook, where a format learns one

    def columns(self, start: int, stop: int) -> Grid:
        """The grid of columns [start, stop) alone; a view, nothing is copied."""
        start, stop = self.start + start, self.start + stop
        first, last = start // self.group, -(-stop // self.group)
        zero = None if self.zero is None else self.zero[:, first:last]
        return replace(self, scale=self.scale[:, first:last], zero=zero, start=start - first * self.group)

    def to(self, device: torch.device) -> Grid:
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in self._tensors().items()
        }
        return replace(self, **moved)

    def equals(self, other: Grid) -> bool:
        """Whether both are the same, bit for bit, on whatever devices."""
        if (self.group, self.start) != (other.group, other.start):
            return False
        pairs = zip(self._tensors().values(), other._tensors().values(), strict=True)
        return all(a is b if a is None or b is None else torch.equal(a.cpu(), b.cpu()) for a, b in pairs)

    def rows_of(self, other: Grid, chosen: Tensor) -> Grid | None:
        """This grid with the rows chosen (out,) bool of the other; None where rows share what differs between them."""
        mixed: dict[str, Any] = {}
        for name, own in self._tensors().items():
            theirs = other._tensors()[name]
            if own is None or theirs is None or torch.equal(own, theirs):
                mixed[name] = own
            elif len(own) == len(chosen):
                mixed[name] = torch.where(chosen.view(-1, *[1] * (own.dim() - 1)), theirs, own)
            else:
                return None
        return replace(self, **mixed)

    def _tensors(self) -> dict[str, Tensor | None]:
        return {"scale": self.scale, "zero": self.zero, "outer": self.outer, "levels": self.levels}

    def runs(self, columns: int) -> Iterator[tuple[slice, slice, int]]:
        """Cut `columns` columns into at most three runs of equally long groups: (columns, groups, columns a group)."""
        column, group = 0, 0
        while column < columns:
            width = min(self.group - (self.start if column == 0 else 0), columns - column)
            count = max(1, (columns - column) // self.group) if width == self.group else 1
            yield slice(column, column + count * width), slice(group, group + count), width
            column, group = column + count * width, group + count

    def visit(self, shape: tuple[int, int], work: Visitor) -> None:
        """Call work(rows, columns, width, scale, zero) for every run of groups of a matrix (out, columns).

        `matrix[rows, columns].unflatten(1, (-1, width))` is (rows, groups, width), and scale and zero are views that
        broadcast against it. On a CPU a few rows at a time, on other devices all.
        """
        for rows in few_rows(*shape, self.scale.device):
            own = slice(0, 1) if self.scale.shape[0] == 1 else rows
            for columns, groups, width in self.runs(shape[1]):
                zero = None if self.zero is None else self.zero[own, groups, None]
                work(rows, columns, width, self.scale[own, groups, None], zero)


@dataclass(frozen=True)
class Lattice:
    """All values that a weight can take on a fixed grid, for loops that round element by element:

        value = (levels[k] - zero) * scale + offset,  code = codes[k]

    scale, zero and offset are those of the element's group, as in Grid: column c of the matrix has entry c // group.
    """

    levels: Tensor  # (1 or out, K) float32, ascending
    codes: Tensor  # (K,), the code of every level
    scale: Tensor  # (1 or out, groups) float32
    zero: Tensor | None  # (1 or out, groups) float32
    offset: Tensor | None  # (1 or out, groups) float32
    group: int


def gaps(levels: Tensor) -> Tensor:
    """The mean distance between levels (1 or out, K) that follow each other, (1 or out, 1)."""
    return (levels[:, -1:] - levels[:, :1]) / (levels.shape[1] - 1)


def between(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Where x (out, in) lies among ascending levels (1 or out, K), as a real number, and the distance of the two next.

    Beyond the ends the line through the last two goes on.
    """
    below = torch.searchsorted(levels.expand(len(x), -1).contiguous(), x.contiguous(), right=True).sub_(1)
    below.clamp_(0, levels.shape[1] - 2)
    each = levels.expand(len(x), -1)
    low = each.gather(1, below)
    gap = each.gather(1, below + 1) - low
    gap = torch.where(gap > 0, gap, 1.0)  # a table may say a level twice
    return (x - low).div_(gap).add_(below), gap


class Format(ABC):
    """What codes mean. Instances are immutable values: equal specs are equal formats."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The text that `formats.get` turns into this very format."""

    @property
    def compressed_tensors(self) -> str | None:
        """The format of compressed-tensors whose bytes a file of this one has, where there is one."""
        return None

    @abstractmethod
    def stored_for(self, dtype: torch.dtype) -> Format:
        """This format with its scale type, where the spec left it open, settled for a weight of type `dtype`."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> Grid:
        """The grid for w (out, in) float32.

        importance (in,): what an error in each column weighs, the diagonal of the Hessian. Raises NonFiniteInput,
        ScaleOverflow, PlanError for an unknown clip mode.
        """

    @abstractmethod
    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """Codes (out, columns) of the levels nearest to w (out, columns) float32."""

    @abstractmethod
    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The values (out, columns) float32 that the codes stand for."""

    @abstractmethod
    def lattice(self, grid: Grid) -> Lattice:
        """The values that codes stand for on the grid of a whole weight, for each row and group."""

    @abstractmethod
    def storable(self, scale: Tensor, grid: Grid, group: int | slice) -> Tensor:
        """The scales nearest to `scale` that a file can hold for this group, or these, of the grid of a whole weight.

        scale: of the shape of `grid.scale[:, group]`. A scale that is bound to others stays as it is in the grid.
        """

    def alternative(self, grid: Grid, which: int) -> tuple[int, Tensor] | None:
        """Other scales for the grid of a whole weight, where those that a file can hold are few and far between.

        Returns how many columns change together, and the scales; those of any such columns may be taken without the
        rest. which: 0, 1 .. until None.
        """
        return None

    @abstractmethod
    def moved(
        self, grid: Grid, *, scale: Tensor | None = None, zero: Tensor | None = None, levels: Tensor | None = None
    ) -> Grid:
        """The grid of a whole weight with other scales, zeros or levels: the nearest to those that a file can hold.

        What the format does not store, or cannot change by itself, stays as it is. Levels are ascending.
        """

    @abstractmethod
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes and grid of a whole weight as the tensors of the file, by suffix."""

    @abstractmethod
    def unpack(self, named: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """The inverse of pack."""

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Suffix -> what pack returns for a weight of this shape. Raises PlanError where the format cannot hold it."""

    @abstractmethod
    def packed_weight(self, named: dict[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        """The file's tensors as the kernels take them; works on meta tensors."""

    @abstractmethod
    def weights_in(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """How many weights are stored in tensors of these shapes, by suffix, if `weight_shape` is not among them."""

    def pieces(self, key: str, shape: tuple[int, int]) -> dict[str, str]:
        """Name in a file -> suffix, of all that a weight is stored as which is `key` there when it is dense."""
        return {key.removesuffix("weight") + suffix: suffix for suffix in self.layout(shape)}

    def named(
        self, tensors: Mapping[str, Tensor], key: str, shape: tuple[int, int], expert: int | None = None
    ) -> dict[str, Tensor]:
        """Suffix -> piece of a weight, out of a file's tensors; of an expert its part of what lies stacked there."""
        found = {suffix: tensors[name] for name, suffix in self.pieces(key, shape).items()}
        return found if expert is None else {suffix: stack[expert] for suffix, stack in found.items()}

    def facts(self, shape: tuple[int, int]) -> Facts:
        """All that the choice of a kernel for a weight of this shape depends on."""
        named = {
            name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in self.layout(shape).items()
        }
        return self.packed_weight(named, shape).facts()

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Every stored bit of a weight of this shape, divided by its elements."""
        return 8 * sum(spec.nbytes for spec in self.layout(shape).values()) / math.prod(shape)

    def quantize(self, w: Tensor, importance: Tensor | None = None, *, clip: str = "search") -> tuple[Tensor, Grid]:
        """Fit, then encode: (codes, grid)."""
        grid = self.fit(w, importance, clip=clip)
        return self.encode(w, grid), grid


def all_finite(tensor: Tensor) -> bool:
    """Piece by piece, so that an embedding is not copied to be looked at."""
    # aminmax hands a NaN through, and takes a tenth of the time of isfinite.
    ends = [torch.aminmax(piece) for piece in tensor.reshape(-1).split(2**20)]
    return all(math.isfinite(low) and math.isfinite(high) for low, high in ends)


def check_finite(w: Tensor) -> None:
    """Raises NonFiniteInput naming the first NaN or Inf of w (out, in) and its index."""
    if not all_finite(w):
        bad = (~torch.isfinite(w)).nonzero()
        row, column = bad[0].tolist()
        raise NonFiniteInput(f"{w[row, column].item()} at [{row}, {column}], {len(bad)} non-finite values in all")
