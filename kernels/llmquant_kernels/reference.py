"""Decoding in plain torch: any weight, any device. The definition that every other backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .weight import DTYPES, Facts, PackedWeight, Prepared


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (rows, columns) uint8 of the bit streams `packed` (rows, words) int32 or (rows, bytes) uint8.

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


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Digits (rows, columns) uint8 of the bytes `packed` (rows, bytes), each of which holds five of base 3."""
    digits = torch.arange(256, device=packed.device).unsqueeze(1) // 3 ** torch.arange(8, device=packed.device) % 3
    # Eight digits a byte, for them to move as one element; three are not there.
    eights = digits.to(torch.uint8).view(torch.int64).flatten()
    index = packed[:, : -(-columns // 5)].int()
    found = eights.index_select(0, index.flatten()).view(torch.uint8).view(*index.shape, 8)
    return found[..., :5].flatten(1)[:, :columns]


def codes_of(weight: PackedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Codes of rows [start, stop), (rows, in) uint8; signed ones as they are stored."""
    packed, columns = weight.packed[start:stop], weight.shape[1]
    return unpack_trits(packed, columns) if weight.trits else unpack(packed, weight.bits, columns)


def levels_of(weight: PackedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """Levels of rows [start, stop), (rows, in) float32."""
    codes = codes_of(weight, start, stop)
    if weight.signed:
        sign = 2 ** (weight.bits - 1)
        return (codes ^ sign).float() - sign
    if weight.levels is None:
        return codes.float()
    index, table = codes.int(), weight.levels
    if table.dim() == 2:
        table = table[start:stop]
        index += torch.arange(0, table.numel(), table.shape[1], dtype=torch.int32, device=index.device).unsqueeze(1)
    return table.float().flatten().index_select(0, index.flatten()).view(codes.shape)


def of_rows(grid: Tensor, start: int, stop: int | None) -> Tensor:
    """Rows [start, stop) of a scale, zero or offset as float32 (rows or 1, groups, 1)."""
    grid = grid if grid.shape[0] == 1 else grid[start:stop]
    if grid.dtype == torch.float8_e4m3fn and grid.device.type == "cpu":
        # On a CPU torch converts these one by one: a table is five times as fast.
        values = torch.arange(256, dtype=torch.uint8).view(grid.dtype).float()
        return values.index_select(0, grid.view(torch.uint8).int().flatten()).view(*grid.shape, 1)
    return grid.float().unsqueeze(-1)


def scale_of(weight: PackedWeight, start: int = 0, stop: int | None = None) -> Tensor:
    """What the levels of rows [start, stop) are multiplied by, (rows or 1, groups, 1) float32."""
    scale = of_rows(weight.scale, start, stop)
    return scale if weight.outer is None else scale * of_rows(weight.outer, start, stop)


def decode(weight: PackedWeight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows [start, stop) of the weight, (rows, in), computed in float32 and rounded once to `dtype`."""
    columns = weight.shape[1]
    group = min(weight.group, columns)
    value = levels_of(weight, start, stop)
    value = functional.pad(value, (0, weight.groups * group - columns)).unflatten(1, (weight.groups, group))
    if isinstance(weight.zero, Tensor) or weight.zero:
        value = value - (of_rows(weight.zero, start, stop) if isinstance(weight.zero, Tensor) else weight.zero)
    value = value * scale_of(weight, start, stop)
    if weight.micro is not None:
        halved = unpack(weight.micro[start:stop], 1, weight.groups * 8).repeat_interleave(2, dim=1)
        value = value * (1 - 0.5 * halved.unflatten(1, (weight.groups, 16))[..., :group])
    if weight.offset is not None:
        value = value + of_rows(weight.offset, start, stop)
    return value.flatten(1)[:, :columns].to(dtype)


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
