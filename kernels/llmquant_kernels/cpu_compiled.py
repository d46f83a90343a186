"""The CPU backend for every weight: few rows of x by codes as they are decoded, many by the weight decoded in blocks.

Its loops are compiled by what this package does not import. Whoever has them says where they are: `use`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from .weight import DTYPES, Facts, PackedWeight, Prepared

# How codes become levels. TABLE: by a table of them. INTEGER: they are integers, two's complement if `sign` is not 0.
# FLOAT: sign | exponent | mantissa, times a power of two. TRITS: five digits a byte.
TABLE, INTEGER, FLOAT, TRITS = range(4)
# Weights that a thread decodes at a time, for a product of many rows.
BLOCK = 2**20


class Encoded(NamedTuple):
    """A PackedWeight in the one shape that the loops know. Grids have one row for each row of the weight, or one."""

    shape: tuple[int, int]
    packed: Tensor  # (out, bytes) uint8
    tail: Tensor  # (bytes,) uint8: the last rows of packed once more, and 16 bytes, for words are read past the end
    table: Tensor  # (1 or out, 2**bits) float32, repeated up to 16; of trits (1, 2048): five a byte, and three zeros
    scale: Tensor  # (1 or out, groups * 1, 2 or 4) uint8: the bytes of the scales
    scales: Tensor  # (256 or 65536,) float32: what they stand for, where they have 8 or 16 bits
    zero: Tensor  # (1 or out, groups) float32, or (1, 1), or (0, 0): levels are less the zero already
    outer: Tensor  # (1 or out, 1) float32, or (0, 0)
    offset: Tensor  # (1 or out, groups) float32, or (0, 0)
    micro: Tensor  # (out, groups) uint8, or (0, 0)
    bits: int
    group: int
    way: int
    sign: int  # the bit of the sign, if any
    least: int  # of INTEGER: what is taken from codes; of FLOAT: 1 for no zero of -0
    mantissa: int  # of FLOAT: bits
    exponent: int  # of FLOAT: of the factor
    largest: int  # of FLOAT: the greatest code that is a number, without its sign

    def parts(self) -> tuple[list[Tensor], list[int]]:
        return list(self[1:10]), list(self[10:])


class Loops(Protocol):
    """What the module given to `use` has."""

    def prepare(self, weight: Encoded) -> Any:
        """What the others take for a weight, of which it does not keep the tensors."""

    DOTS: bool  # whether `multiply` takes bfloat16

    def most_rows(self, dtype: torch.dtype) -> int:
        """How many rows of x `multiply` is for; for more, blocks of the weight are decoded and multiplied by torch."""

    def multiply(self, weight: Any, x: Tensor) -> Tensor:
        """x (rows, in) float32, or bfloat16 where DOTS, contiguous -> (rows, out) float32."""

    def decode(self, weight: Any, start: int, out: Tensor) -> None:
        """Write the rows of the weight from `start` on to out (rows, in), float32 or bfloat16, contiguous."""


_where: list[Callable[[], Any]] = []


def use(load: Callable[[], Any]) -> None:
    """Have the loops of the module that `load` gives. It is called when they are needed."""
    _where[:] = [load]


def _loops() -> Loops:
    return _where[0]()


class CpuCompiled(Prepared):
    """Any weight, by loops compiled for the CPU at hand.

    Few rows of x are multiplied while the weight is decoded, in float32, or bfloat16 where the CPU multiplies that. For
    more a block of rows of the weight at a time is decoded for torch's product, in the same types.
    Holds the tensors of the PackedWeight and a copy of `zero`; with `keep_decoded` the decoded weight too.
    """

    name = "cpu_compiled"

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype)
        self.encoded = encode(weight)
        self.tensors, self.numbers = self.encoded.parts()
        self.ready = _loops().prepare(self.encoded)
        self.decoded: Tensor | None = None
        if keep_decoded:
            exact = torch.empty(self.shape, dtype=torch.float32 if dtype == torch.float16 else dtype)
            _loops().decode(self.ready, 0, exact)
            self.decoded = exact.to(dtype)

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if facts.device != "cpu":
            return f"runs on the CPU only, the weight is on {facts.device}"
        if dtype not in DTYPES:
            return f"activations must be float16, bfloat16 or float32, not {dtype}"
        if not _where:
            return "its compiled loops are not there: importing llmquant brings them"
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            raise self.wrong_dtype(x)
        if self.decoded is not None and x.numel() > _loops().most_rows(self.dtype) * self.shape[1]:
            return functional.linear(x, self.decoded, bias)
        if torch.compiler.is_compiling():
            return product(x, bias, self.tensors, self.numbers, self.shape[1])
        return _product(x, bias, self.ready, self.shape)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.encoded.tail.nbytes + self.encoded.zero.nbytes


# What loops made of the tensors of an Encoded, by its codes, and where these lay then.
_prepared = WeakTensorKeyDictionary()


@torch.library.custom_op("llmquant::cpu_linear", mutates_args=())
def product(x: Tensor, bias: Tensor | None, tensors: list[Tensor], numbers: list[int], columns: int) -> Tensor:
    """``x @ w.T + bias``: x (..., columns) -> (..., rows). The rest is an Encoded. What torch.compile sees."""
    shape = tensors[0].shape[0], columns
    where = [columns, *numbers, *(tensor.data_ptr() for tensor in tensors)]
    known = _prepared.get(tensors[0])
    if known is None or known[0] != where:
        ready = _loops().prepare(Encoded(shape, *tensors, *numbers))  # type: ignore[arg-type]
        known = _prepared[tensors[0]] = where, ready
    return _product(x, bias, known[1], shape)


@product.register_fake
def _(x: Tensor, bias: Tensor | None, tensors: list[Tensor], numbers: list[int], columns: int) -> Tensor:
    _check_columns(x, columns)
    return x.new_empty(*x.shape[:-1], tensors[0].shape[0])


def _check_columns(x: Tensor, columns: int) -> None:
    if x.shape[-1] != columns:
        raise RuntimeError(f"x must be (..., {columns}), not {tuple(x.shape)}")


def _product(x: Tensor, bias: Tensor | None, weight: Any, shape: tuple[int, int]) -> Tensor:
    rows, columns = shape
    _check_columns(x, columns)
    flat = x.reshape(-1, columns)
    if len(flat) > _loops().most_rows(x.dtype):
        return _many_rows(flat, bias, weight, shape).view(*x.shape[:-1], rows)
    own = flat if flat.dtype == torch.bfloat16 and _loops().DOTS else flat.float()
    y = _loops().multiply(weight, own.contiguous())
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def _many_rows(x: Tensor, bias: Tensor | None, weight: Any, shape: tuple[int, int]) -> Tensor:
    """x (rows, in) -> (rows, out), by a block of the weight's rows at a time."""
    rows, columns = shape
    dtype = x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
    own, step = x.to(dtype), max(16, torch.get_num_threads() * BLOCK // columns // 16 * 16)
    y, room = x.new_empty(len(x), rows), torch.empty(min(step, rows), columns, dtype=dtype)
    for start in range(0, rows, step):
        block = room[: min(step, rows - start)]
        _loops().decode(weight, start, block)
        own_bias = None if bias is None else bias[start : start + step].to(dtype)
        y[:, start : start + step] = functional.linear(own, block, own_bias)
    return y


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether torch has a fast product of bfloat16 on this CPU; elsewhere that of float32 takes a fifth of the time."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- a weight in the shape that the loops know


def encode(weight: PackedWeight) -> Encoded:
    rows, columns = weight.shape
    packed = weight.packed.contiguous().view(torch.uint8)
    spared = min(rows, 1 + -(-16 // packed.shape[1]))
    way, table, zero, numbers = _way(weight)
    scale, none = weight.scale.contiguous(), torch.empty(0, 0)
    return Encoded(
        (rows, columns),
        packed,
        functional.pad(packed[rows - spared :].flatten(), (0, 16)),
        table,
        scale.view(torch.uint8),
        _scales(scale.dtype),
        zero.float().contiguous() if isinstance(zero, Tensor) else torch.full((1, 1), float(zero)) if zero else none,
        none if weight.outer is None else weight.outer.float().contiguous(),
        none if weight.offset is None else weight.offset.float().contiguous(),
        none.byte() if weight.micro is None else weight.micro.contiguous(),
        weight.bits,
        weight.group,
        way,
        *numbers,
    )


def _way(weight: PackedWeight) -> tuple[int, Tensor, Tensor | int, tuple[int, int, int, int, int]]:
    """How its codes become levels, the table for it, the zero that these are not less yet, and the last of Encoded."""
    bits, levels, zero = weight.bits, weight.levels, weight.zero
    left, taken = (zero, 0) if isinstance(zero, Tensor) else (0, zero)  # by the loop group by group, or beforehand
    nothing = torch.zeros(1, 1)
    if weight.trits:
        digits = torch.arange(256).unsqueeze(1) // 3 ** torch.arange(5) % 3
        return TRITS, functional.pad(digits.float() - taken, (0, 3)).view(1, -1), left, (0, 0, 0, 0, 0)
    if levels is None:
        return INTEGER, nothing, left, (2 ** (bits - 1) if weight.signed else 0, taken, 0, 0, 0)
    if bits >= 4 and levels.dim() == 1 and (found := as_floats(levels.float(), bits)):
        return FLOAT, nothing, zero, found
    table = levels.float().view(-1, 2**bits) - taken
    return TABLE, table.repeat(1, max(1, 16 // 2**bits)), left, (0, 0, 0, 0, 0)


def as_floats(levels: Tensor, bits: int) -> tuple[int, int, int, int, int] | None:
    """The last of Encoded for levels (2**bits,) that are floating-point numbers, or integers with a sign.

    The codes are sign | exponent | mantissa, with subnormal numbers and NaN beyond the largest; of five bits of
    exponent the highest is for Inf. None where levels are nothing of the kind.
    """
    codes, sign = torch.arange(2**bits), 2 ** (bits - 1)
    size, one_zero = codes % sign, not levels[sign].signbit()
    if not 0 < levels[1] < torch.inf:
        return None
    for mantissa in range(max(0, bits - 6), min(bits, 11)):
        placed = size << (10 - mantissa) | (codes & sign) << (16 - bits)
        values = placed.to(torch.int16).view(torch.float16).float()
        factor = levels[1] / values[1]
        exponent = int(factor.log2().round())
        if factor != 2.0**exponent or abs(exponent) > 100:
            continue
        nan = levels[:sign].isnan().nonzero()
        largest = int(nan[0]) - 1 if len(nan) else sign - 1
        expected = torch.where(size > largest, torch.nan, values * factor + (0.0 if one_zero else -0.0))
        if torch.equal(expected.nan_to_num(7e30), levels.nan_to_num(7e30)) and torch.equal(
            expected.signbit() & ~expected.isnan(), levels.signbit() & ~levels.isnan()
        ):
            return sign, int(one_zero), mantissa, exponent, largest
    return None


@lru_cache(maxsize=8)
def _scales(dtype: torch.dtype) -> Tensor:
    """What every pattern of a scale of 8 or 16 bits stands for, float32."""
    if dtype.itemsize == 4:
        return torch.empty(0)
    codes = torch.arange(256**dtype.itemsize)
    return codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype).float()
