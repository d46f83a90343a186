"""What a kernel is given: a quantized weight as plain tensors, the facts that a backend is chosen by, and its base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of activations, and of whatever is a real number
SCALE_DTYPES = (*DTYPES, torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight (out, in), with g = c // group and row 0 of a tensor where it has only one:

        s[r, g] = scale[r, g] * outer[r]
        w[r, c] = (level(q[r, c]) - zero[r, g]) * s[r, g] * 2**-micro[r, c // 2] + offset[r, g]

    in float32, s rounded to float32 before it is used. ``q`` is a code of `bits` bits, and ``level(q)`` is ``q``, or
    ``levels[q]`` where a table is given, or ``levels[r, q]`` where each row has its own.

    Row r is one stream of bits inside ``packed[r]``: code c occupies bits ``c * bits`` to ``c * bits + bits - 1``, the
    lowest bit of the first word or byte first. With `trits` a byte holds five codes instead, each 0, 1 or 2: it is the
    sum of ``q[r, 5 * byte + j] * 3**j``.

    Tensors may be on the meta device: such a weight can be asked which backend would take it, but not prepared. Its
    levels may be on the CPU, where they are constants of a format: which backend takes a table depends on its values.

    Raises TypeError where a tensor has the wrong dtype, ValueError where a shape, a range or a device is wrong.
    """

    packed: Tensor  # (out, words) int32 or (out, bytes) uint8; a row may be padded beyond its last code
    bits: int  # 1 to 8; 2 for trits
    shape: tuple[int, int]  # (out, in), the real one
    group: int  # columns that share a scale; >= in means one group per row; the last group may be short
    # (out or 1, groups) float16, bfloat16 or float32, which may be negative, or uint8, an integer, or float8_e8m0fnu or
    # float8_e4m3fn
    scale: Tensor
    zero: Tensor | int = 0  # (out or 1, groups) of an integer dtype, or one int for all; in units of levels
    offset: Tensor | None = None  # (out or 1, groups), dtype of scale, float32 where that has 8 bits; added last
    levels: Tensor | None = None  # (2**bits,) or (out, 2**bits) float16, bfloat16 or float32
    outer: Tensor | None = None  # (out or 1, 1) float16, bfloat16 or float32: the scale of the scales
    micro: Tensor | None = None  # (out, ceil(in / 16)) uint8, one bit for two columns, lowest first; group is 16
    signed: bool = False  # q is a two's complement integer; not with levels or trits
    trits: bool = False  # packed is uint8 and holds digits of base 3, without levels

    def __post_init__(self) -> None:
        _check(self)

    @property
    def groups(self) -> int:
        """Groups in one row, a short last one included."""
        return -(-self.shape[1] // self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors held."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))

    def rows(self, index: Tensor) -> PackedWeight:
        """Some rows of it, index (n,) int64, n > 0: a copy."""

        def take(tensor: Any) -> Any:
            own = isinstance(tensor, Tensor) and tensor.dim() == 2 and len(tensor) == self.shape[0]
            return tensor[index] if own else tensor

        taken = {name: take(value) for name, value in vars(self).items()}
        return replace(self, **{**taken, "shape": (len(index), self.shape[1])})

    @staticmethod
    def stack(weights: Sequence[PackedWeight], rows: int) -> PackedWeight:
        """Weights of one format and shape, one below the other, the last row of each repeated up to `rows`: a copy."""
        first = weights[0]
        own = first.shape[0]
        alike = (first.bits, first.shape, first.group, first.signed, first.trits)
        if any((w.bits, w.shape, w.group, w.signed, w.trits) != alike for w in weights):
            raise ValueError("weights of different formats or shapes cannot be stacked")

        def below(name: str) -> Any:
            values = [getattr(w, name) for w in weights]
            if name == "levels" and values[0] is not None and values[0].dim() == 1:
                if all(torch.equal(value, values[0]) for value in values):
                    return values[0]
                values = [value.expand(own, -1) for value in values]
            if not any(isinstance(value, Tensor) for value in values):
                if any(value != values[0] for value in values):
                    raise ValueError(f"weights of different {name} cannot be stacked: {values}")
                return values[0]
            values = [value.expand(own, -1) for value in values]
            return torch.cat([torch.cat([value, value[-1:].expand(rows - own, -1)]) for value in values])

        fields = ("packed", "scale", "zero", "offset", "levels", "outer", "micro")
        shape = (len(weights) * rows, first.shape[1])
        return replace(first, shape=shape, **{name: below(name) for name in fields})

    def facts(self, device: str | None = None) -> Facts:
        """What backends decide on. `device` replaces the tensors' own: a weight on meta is asked about as on "cpu"."""
        own = self.packed.device.type
        integers = None if self.levels is None else integer_levels(self.levels)
        return Facts(
            bits=self.bits,
            shape=self.shape,
            group=self.group,
            zero=None if isinstance(self.zero, Tensor) else self.zero,
            has_levels=self.levels is not None,
            integer_bits=None if integers is None else bits_of(integers[0]),
            has_micro=self.micro is not None,
            device=device or ("cpu" if own == "meta" else own),
        )


@dataclass(frozen=True)
class Facts:
    """All that the choice of a backend depends on, apart from the dtype of activations. Holds no tensor."""

    bits: int
    shape: tuple[int, int]  # (out, in)
    group: int
    zero: int | None = 0  # the one zero point, or None where it is a tensor
    has_levels: bool = False
    integer_bits: int | None = None  # of levels that are multiples of a power of two; None where not, or where unknown
    has_micro: bool = False
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

    def packed(self) -> Tensor | None:
        """The `packed` of the weight that this was made of, bit for bit, for its owner not to hold it too.

        None where that cannot be made again, or where this holds the tensor itself.
        """
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that preparing added to those of the PackedWeight."""
        return sum(t.numel() * t.element_size() for t in vars(self).values() if isinstance(t, Tensor))

    def wrong_dtype(self, x: Tensor) -> TypeError:
        return TypeError(f"the weight was prepared for activations of {self.dtype}, not {x.dtype}")


def integer_levels(levels: Tensor) -> tuple[Tensor, int] | None:
    """(levels * 2**k as int16, k) for the least k of 0 to 7 that makes integers of -128 to 127 of them, if one does.

    None on the meta device too, and for levels (out, 2**bits) of each row.
    """
    if levels.is_meta or levels.dim() > 1:
        return None
    for k in range(8):
        scaled = levels.float() * 2**k
        if bool(((scaled == scaled.round()) & (scaled >= -128) & (scaled <= 127)).all()):
            return scaled.short(), k
    return None


def bits_of(integers: Tensor) -> int:
    """Bits that hold any of them less the least."""
    return max(1, int(integers.max() - integers.min()).bit_length())


def _check(w: PackedWeight) -> None:
    rows, columns = w.shape
    if not 1 <= w.bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {w.bits}")
    if rows < 1 or columns < 1 or w.group < 1:
        raise ValueError(f"shape and group must be positive, not {w.shape} and {w.group}")
    if w.trits and (w.bits != 2 or w.signed or w.levels is not None):
        raise ValueError("trits must have 2 bits, and be neither signed nor codes of levels")
    if w.signed and w.levels is not None:
        raise ValueError("signed codes are integers, not codes of levels")
    _check_packed(w)
    _check_grids(w)
    if w.levels is not None:
        if w.levels.dtype not in DTYPES:
            raise TypeError(f"levels must be float16, bfloat16 or float32, not {w.levels.dtype}")
        if tuple(w.levels.shape) not in ((2**w.bits,), (rows, 2**w.bits)):
            raise ValueError(f"levels must be ({2**w.bits},) or ({rows}, {2**w.bits}), not {tuple(w.levels.shape)}")
    if w.micro is not None:
        if w.micro.dtype != torch.uint8:
            raise TypeError(f"micro must be uint8, not {w.micro.dtype}")
        if w.group != 16 or tuple(w.micro.shape) != (rows, w.groups):
            raise ValueError(
                f"micro must be ({rows}, {-(-columns // 16)}) for groups of 16, "
                f"not {tuple(w.micro.shape)} for groups of {w.group}"
            )
    for name, tensor in vars(w).items():
        if not isinstance(tensor, Tensor) or tensor.device == w.packed.device:
            continue
        if not (name == "levels" and w.packed.is_meta):
            raise ValueError(f"{name} is on {tensor.device} but packed is on {w.packed.device}")


def _check_packed(w: PackedWeight) -> None:
    rows, columns = w.shape
    if w.packed.dtype not in (torch.int32, torch.uint8) or (w.trits and w.packed.dtype != torch.uint8):
        raise TypeError(f"packed must be {'uint8 for trits' if w.trits else 'int32 or uint8'}, not {w.packed.dtype}")
    least = -(-columns // 5) if w.trits else -(-columns * w.bits // (8 * w.packed.element_size()))
    if w.packed.dim() != 2 or w.packed.shape[0] != rows or w.packed.shape[1] < least:
        raise ValueError(
            f"packed must be ({rows}, {least} or more) for {'trits' if w.trits else f'{w.bits} bits'} "
            f"and shape {w.shape}, not {tuple(w.packed.shape)}"
        )


def _check_grids(w: PackedWeight) -> None:
    rows = w.shape[0]
    if w.scale.dtype not in SCALE_DTYPES:
        known = "float16, bfloat16, float32, uint8, float8_e8m0fnu or float8_e4m3fn"
        raise TypeError(f"scale must be {known}, not {w.scale.dtype}")
    if isinstance(w.zero, Tensor) and (w.zero.is_floating_point() or w.zero.is_complex() or w.zero.dtype == torch.bool):
        raise TypeError(f"zero must have an integer dtype, not {w.zero.dtype}; a real one is an offset")
    if w.offset is not None and w.scale.dtype in DTYPES and w.offset.dtype != w.scale.dtype:
        raise TypeError(f"offset must have the dtype of scale, {w.scale.dtype}, not {w.offset.dtype}")
    if w.offset is not None and w.scale.dtype not in DTYPES and w.offset.dtype != torch.float32:
        raise TypeError(f"offset must be float32 where scale is {w.scale.dtype}, not {w.offset.dtype}")
    if w.outer is not None and w.outer.dtype not in DTYPES:
        raise TypeError(f"outer must be float16, bfloat16 or float32, not {w.outer.dtype}")
    for name in ("scale", "zero", "offset", "outer"):
        tensor = getattr(w, name)
        width = 1 if name == "outer" else w.groups
        if isinstance(tensor, Tensor) and tuple(tensor.shape) not in ((rows, width), (1, width)):
            raise ValueError(f"{name} must be ({rows} or 1, {width}), not {tuple(tensor.shape)}")
