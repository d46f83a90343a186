"""What a kernel is given: a quantized weight as plain tensors, the facts that a backend is chosen by, and its base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = SCALE_DTYPES  # of activations


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight (out, in), with g = c // group and row 0 of scale, zero or offset where they have only one:

        w[r, c] = (level(q[r, c]) - zero[r, g]) * scale[r, g] + offset[r, g]

    ``q`` is an unsigned code of `bits` bits and ``level(q)`` is ``q``, or ``levels[q]`` where a table is given. Row r
    is one stream of bits inside ``packed[r]``: code c occupies bits ``c * bits`` to ``c * bits + bits - 1``, the lowest
    bit of the first word first.

    Tensors may be on the meta device: such a weight can be asked which backend would take it, but not prepared.

    Raises TypeError where a tensor has the wrong dtype, ValueError where a shape, a range or a device is wrong.
    """

    packed: Tensor  # (out, words) int32; a row may be padded beyond its last code
    bits: int  # 1 to 8
    shape: tuple[int, int]  # (out, in), the real one
    group: int  # columns that share a scale; >= in means one group per row; the last group may be short
    scale: Tensor  # (out or 1, groups) float16, bfloat16 or float32; may be negative
    zero: Tensor | int = 0  # (out or 1, groups) of an integer dtype, or one int for all; in units of levels
    offset: Tensor | None = None  # (out or 1, groups), dtype of scale; added after scaling
    levels: Tensor | None = None  # (2**bits,) float32

    def __post_init__(self) -> None:
        _check(self)

    @property
    def groups(self) -> int:
        """Groups in one row, a short last one included."""
        return -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors held."""
        tensors = (self.packed, self.scale, self.zero, self.offset, self.levels)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def facts(self, device: str | None = None) -> Facts:
        """What backends decide on. `device` replaces the tensors' own: a weight on meta is asked about as on "cpu"."""
        own = self.packed.device.type
        return Facts(
            bits=self.bits,
            shape=self.shape,
            group=self.group,
            scale_rows=self.scale.shape[0],
            zero=None if isinstance(self.zero, Tensor) else self.zero,
            has_offset=self.offset is not None,
            has_levels=self.levels is not None,
            device=device or ("cpu" if own == "meta" else own),
        )


@dataclass(frozen=True)
class Facts:
    """All that the choice of a backend depends on, apart from the dtype of activations. Holds no tensor."""

    bits: int
    shape: tuple[int, int]  # (out, in)
    group: int
    scale_rows: int = 0  # rows of scale: out or 1; 0 stands for out
    zero: int | None = 0  # the one zero point, or None where it is a tensor
    has_offset: bool = False
    has_levels: bool = False
    device: str = "cpu"  # a device type, without an index


class Prepared(ABC):
    """A weight made ready for one backend and one dtype of activations. A backend is a subclass.

    What a subclass holds counts: it says in its docstring which copies of the weight it makes.
    """

    name: ClassVar[str]

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        self.shape = weight.shape
        self.dtype = dtype

    @classmethod
    @abstractmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        """Why this backend cannot take such a weight with activations of `dtype`; None where it can."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ w.T + bias``: x (..., in), bias (out,), result (..., out), all of ``self.dtype``.

        Raises TypeError where x has another dtype, RuntimeError (from torch) where its last dimension is not `in`.
        """

    @property
    def nbytes(self) -> int:
        """Bytes that preparing added to those of the PackedWeight."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))

    def wrong_dtype(self, x: Tensor) -> TypeError:
        return TypeError(f"the weight was prepared for activations of {self.dtype}, not {x.dtype}")


def _check(w: PackedWeight) -> None:
    rows, columns = w.shape
    if not 1 <= w.bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {w.bits}")
    if rows < 1 or columns < 1 or w.group < 1:
        raise ValueError(f"shape and group must be positive, not {w.shape} and {w.group}")
    if w.packed.dtype != torch.int32:
        raise TypeError(f"packed must be int32, not {w.packed.dtype}")
    words = -(-columns * w.bits // 32)
    if w.packed.dim() != 2 or w.packed.shape[0] != rows or w.packed.shape[1] < words:
        raise ValueError(
            f"packed must be ({rows}, {words} or more) for {w.bits} bits and shape {w.shape}, "
            f"not {tuple(w.packed.shape)}"
        )
    if w.scale.dtype not in SCALE_DTYPES:
        raise TypeError(f"scale must be float16, bfloat16 or float32, not {w.scale.dtype}")
    if isinstance(w.zero, Tensor) and (w.zero.is_floating_point() or w.zero.is_complex() or w.zero.dtype == torch.bool):
        raise TypeError(f"zero must have an integer dtype, not {w.zero.dtype}; a real one is an offset")
    if w.offset is not None and w.offset.dtype != w.scale.dtype:
        raise TypeError(f"offset must have the dtype of scale, {w.scale.dtype}, not {w.offset.dtype}")
    for name in ("scale", "zero", "offset"):
        tensor = getattr(w, name)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) not in ((rows, w.groups), (1, w.groups)):
            raise ValueError(f"{name} must be ({rows} or 1, {w.groups}), not {tuple(tensor.shape)}")
    if w.levels is not None:
        if w.levels.dtype != torch.float32:
            raise TypeError(f"levels must be float32, not {w.levels.dtype}")
        if tuple(w.levels.shape) != (2**w.bits,):
            raise ValueError(f"levels must be ({2**w.bits},), not {tuple(w.levels.shape)}")
    for name in ("scale", "zero", "offset", "levels"):
        tensor = getattr(w, name)
        if isinstance(tensor, Tensor) and tensor.device != w.packed.device:
            raise ValueError(f"{name} is on {tensor.device} but packed is on {w.packed.device}")
