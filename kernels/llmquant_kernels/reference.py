"""Decoding in plain torch: any weight, any device. The definition that every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .weight import DTYPES, Facts, PackedWeight, Prepared


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of the bit streams `packed` (rows, words) int32.

    Eight codes fill exactly `bits` bytes, so code i of every eight lies at the same place in them, over at most two.
    Reads words as bytes, lowest first: for little-endian machines, as is every one that torch is built for.
    """
    eights = -(-columns // 8)
    data = packed.contiguous().view(torch.uint8)
    data = functional.pad(data, (0, max(0, eights * bits - data.shape[1])))[:, : eights * bits].unflatten(
        1, (eights, bits)
    )
    codes = torch.empty(packed.shape[0], eights, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code |= data[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(1)[:, :columns]


def decode(weight: PackedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows [start, stop) of the weight, (rows, in), computed in float32 and rounded once to `dtype`."""
    columns = weight.shape[1]
    group = min(weight.group, columns)
    codes = unpack(weight.packed[start:stop], weight.bits, columns)
    value = codes.float() if weight.levels is None else weight.levels[codes.int()]
    value = functional.pad(value, (0, weight.groups * group - columns)).unflatten(1, (weight.groups, group))
    if isinstance(weight.zero, Tensor) or weight.zero:
        value = value - (of_rows(weight.zero, start, stop) if isinstance(weight.zero, Tensor) else weight.zero)
    value = value * of_rows(weight.scale, start, stop)
    if weight.offset is not None:
        value = value + of_rows(weight.offset, start, stop)
    return value.flatten(1)[:, :columns].to(dtype)


def of_rows(grid: Tensor, start: int, stop: int | None) -> Tensor:
    """Rows [start, stop) of a scale, zero or offset as float32 (rows or 1, groups, 1)."""
    return (grid if grid.shape[0] == 1 else grid[start:stop]).float().unsqueeze(-1)


class Reference(Prepared):
    """Decodes the whole weight in every call. Holds the PackedWeight, and the decoded weight if asked to keep it."""

    name = "reference"

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, keep_decoded: bool = False) -> None:
        super().__init__(weight, dtype)
        self.weight = weight
        self.decoded = decode(weight, dtype) if keep_decoded else None

    @classmethod
    def refuses(cls, facts: Facts, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"activations must be float16, bfloat16 or float32, not {dtype}"
        return None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            raise self.wrong_dtype(x)
        return functional.linear(x, decode(self.weight, self.dtype) if self.decoded is None else self.decoded, bias)
