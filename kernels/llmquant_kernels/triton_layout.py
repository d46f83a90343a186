"""A weight as the Triton kernels read it: codes in the order in which tensor cores take them, scales beside them.

Rows are padded to 16 and columns to 256. Codes of b bits are split into a low part of 1, 2, 4 or 8 bits and, where b is
no power of two, a high part of 1 or 2, each an array of words of 16 bits (8 for parts of one bit). A block is 16 rows
by 32 columns of words, 1 KiB. With P parts to a word, part p of word (row r, column c) of a block belongs to column
``32 * p + c`` of the ``32 * P`` that the block covers. Words lie as [half, lane, 8]: the 16 bytes of lane L are

    half h, number i:   r = 8 * ((i >> 1) & 1) + (L >> 2),   c = 16 * h + 8 * (i >> 2) + 2 * (L & 3) + (i & 1)

which is one operand A of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): loads of 16 bytes, no shuffles.
Knows torch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .reference import codes_of, scale_of, unpack
from .weight import PackedWeight, bits_of, integer_levels

STEP = 256  # columns that the kernels take at a time
STRIP = 16  # rows
CHUNK = 2**24  # codes rearranged at a time: each takes some 20 bytes while it is
SCALES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}
FLOATS = {4: ((2, 1),), 6: ((2, 3), (3, 2)), 8: ((4, 3), (5, 2))}  # exponent and mantissa of floats of so many bits


class Spec(NamedTuple):
    """All that the kernels must know of a weight beside its tensors; as text, an argument of the operators.

    numbers: "int4": an unsigned integer less `zero`; "e2m1": sign, exponent, mantissa; "mag8": sign and an integer of 8
    bits; "tab4": an index of a table; "own4": of a table in memory, of all rows or of each; "row4": of
    the row's own table, in bytes.
    """

    rows: int
    columns: int
    group: int  # columns that share a scale
    padded: int  # columns that a group takes in the layout, a multiple of 16; equal to group in most formats
    numbers: str
    scale: str  # a value of SCALES
    units: int  # scales stored for 256 columns: 16, 8, 4, 2 or 1; 0: one a row, applied at the end
    zero: float  # of "int"; NaN where it is a tensor
    boost: int  # scales are multiplied by 2**boost where weights are scaled before the product, for float16's sake

    @property
    def text(self) -> str:
        return "|".join(str(value) for value in self)

    @classmethod
    def of(cls, text: str) -> Spec:
        kinds = (int, int, int, int, str, str, int, float, int)
        return cls(*(kind(value) for kind, value in zip(kinds, text.split("|"), strict=True)))

    @property
    def bits(self) -> int:
        return bits_of_numbers(self.numbers)

    @property
    def layout_columns(self) -> int:
        """Columns of the activations as the kernels take them."""
        return self.columns if self.group == self.padded else -(-self.columns // self.group) * self.padded

    @property
    def steps(self) -> int:
        return -(-self.layout_columns // STEP)


class Origin(NamedTuple):
    """The `packed` of a PackedWeight, but for its codes."""

    bits: int
    trits: bool
    dtype: torch.dtype
    width: int  # of a row, in numbers of dtype
    codes: Tensor | None  # (2**bits of the layout,) uint8: the stored code of each; None: the same


@dataclass(frozen=True)
class Layout:
    """A weight for the kernels. Tensors that a format has no use for are None."""

    spec: Spec
    low: Tensor  # (strips, blocks, 512) int16, int8 where a part has one bit
    high: Tensor | None  # (strips, steps, 512) int16 or int8
    scale: Tensor | None  # (strips, steps, words, 16) int32: the scales of a row, side by side in words
    zero: Tensor | None  # the same of 16-bit floats: -zero * unit_of(numbers)
    table: Tensor | None  # (padded rows or 1, 2**bits) float32; "row": (padded rows, 8) int32, see `table_bytes`
    row: Tensor  # (rows,) float32: what the products are multiplied by at the end
    offset: Tensor | None  # (rows, groups) float32: added to the weights of a group
    origin: Origin | None  # how to make the weight's codes again; None where more than codes went into words


def tensors_of(held: Any) -> list[Tensor | None]:
    """The tensors of a Layout, or of what holds them under the same names, in the order of the operators."""
    return [getattr(held, name) for name in ("low", "high", "scale", "zero", "table", "row", "offset")]


def bits_of_numbers(numbers: str) -> int:
    if numbers[0] == "e":
        return 1 + int(numbers[1]) + int(numbers[3])
    return int(numbers[3:]) + (numbers[:3] == "mag")


def low_bits(bits: int) -> int:
    return {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 8, 8: 8, 9: 8}[bits]


def high_bits(bits: int) -> int:
    return {3: 1, 5: 1, 6: 2, 9: 1}.get(bits, 0)


def place_of(numbers: str, low: int, high: int, part: int, bit: int) -> int:
    """Where bit `bit` of a code in part `part` of eight lies in its word: from 16 up, in the high part's.

    low, high: bits of either part. Parts lie side by side, but for e2m1: there most bits are a mask away from those of
    a bfloat16.
    """
    if numbers == "e2m1":
        return ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))[part % 4][bit]
    if bit >= low:
        return 16 + high * part + bit - low
    return low * (part % (8 if low == 1 else 16 // low)) + bit


def unit_of(numbers: str, dtype: torch.dtype) -> float:
    """What decoding makes of a value of 1: a power of two, for which `row` makes up."""
    if numbers[:3] in ("int", "mag"):
        return 2.0**-10 if dtype == torch.float16 else 2.0**-6
    if numbers[0] == "e" and dtype == torch.float16:
        return 2.0 ** (2 ** (int(numbers[1]) - 1) - 1 - 15)  # the bits as they are: biases differ
    return 1.0


def lay_out(weight: PackedWeight, dtype: torch.dtype) -> Layout:
    """`dtype` is that of the activations; those of float32 are only decoded for, and laid out as for bfloat16.

    Raises ValueError as `numbers_of` does.
    """
    only_decoded = dtype == torch.float32
    dtype = torch.bfloat16 if only_decoded else dtype
    group, groups = min(weight.group, weight.shape[1]), weight.groups
    numbers = numbers_of(weight)
    padded = group if groups == 1 else -(-group // 16) * 16
    unit = next(u for u in (256, 128, 64, 32, 16) if groups == 1 or padded % u == 0)
    table, per_row = numbers.table, groups == 1 and numbers.zero_grid is None
    scale = scale_of(weight).squeeze(-1).expand(weight.shape[0], groups) * 2.0**-numbers.exponent
    if per_row and table is not None and weight.levels is not None and weight.levels.dim() == 2:
        table, scale = table * scale, torch.ones_like(scale)  # rounded once, as a dense weight is
    elif per_row and table is not None:
        per_row = False  # a table for all rows: weights are scaled before they are rounded
    name = numbers.name
    if table is not None and per_row and weight.bits in (2, 3, 4) and not only_decoded:
        name, table = f"row{weight.bits}", table_bytes(table.to(dtype))
    elif table is not None and (table.shape[0] > 1 or weight.bits > 5):
        name = f"own{weight.bits}"
    spec = Spec(*weight.shape, group, padded, name, "fp32", 0 if per_row else STEP // unit, numbers.zero, boost=0)
    row = torch.full((weight.shape[0],), 1 / unit_of(numbers.name, dtype), device=weight.packed.device)
    words = None
    if per_row:
        row = row * scale[:, 0]
    else:
        stored = _stored(weight)
        spec = spec._replace(scale=SCALES[stored.dtype], boost=_boost(stored, numbers, dtype))
        words = _words(_units(stored, spec))
        row = row * 2.0**-numbers.exponent
        if weight.outer is not None:
            row = row * weight.outer.float().squeeze(-1)
    zero = None
    if numbers.zero_grid is not None:
        spec = spec._replace(zero=math.nan)
        zero = _words(_units((numbers.zero_grid.float() * -unit_of(numbers.name, dtype)).to(dtype), spec))
    low, high = _parts(weight, numbers, spec)
    if table is not None and table.shape[0] > 1:
        table = functional.pad(table, (0, 0, 0, -table.shape[0] % STRIP))
    return Layout(spec, low, high, words, zero, table, row.contiguous(), numbers.offset, _origin(weight, numbers))


def table_bytes(table: Tensor) -> Tensor:
    """(rows, up to 16) 16-bit floats -> (rows, 8) int32: sixteen lower bytes, then sixteen upper ones."""
    table = functional.pad(table, (0, 16 - table.shape[1])).contiguous()
    return table.view(torch.uint8).unflatten(1, (16, 2)).transpose(1, 2).reshape(len(table), 32).view(torch.int32)


def _stored(weight: PackedWeight) -> Tensor:
    """Scales (out, groups) in a dtype whose every value the kernels decode."""
    scale = weight.scale
    if scale.dtype == torch.float8_e8m0fnu:
        code = scale.view(torch.uint8)
        if bool(((code == 0) | (code == 255)).any()):  # 2**-127 and NaN are no exponent bits of a float32
            scale = scale.float()
    elif scale.dtype == torch.float8_e4m3fn and bool(scale.float().isnan().any()):
        scale = scale.float()
    return scale


def _boost(scale: Tensor, numbers: Numbers, dtype: torch.dtype) -> int:
    """The greatest power of two that float16 has room for, in the scales and in the weights that they give."""
    if dtype != torch.float16:
        return 0
    largest = float(scale.float().abs().nan_to_num(0, 0, 0).max()) * max(1.0, numbers.largest(dtype))
    return 0 if largest == 0 else max(-30, min(30, math.floor(math.log2(32768 / largest))))


def _units(grid: Tensor, spec: Spec) -> Tensor:
    """(rows, groups) -> (padded rows, steps, units), zero where there is no group."""
    wide = grid.dtype if grid.element_size() > 1 else torch.uint8
    grid = grid.expand(spec.rows, -1).view(wide)
    length = STEP // spec.units
    repeats = spec.steps * spec.units if grid.shape[1] == 1 else spec.padded // length
    grid = grid.repeat_interleave(repeats, dim=1)
    missing = spec.steps * spec.units - grid.shape[1]
    grid = functional.pad(grid, (0, max(0, missing), 0, -spec.rows % STRIP))
    return grid[:, : spec.steps * spec.units].unflatten(1, (spec.steps, spec.units))


def _words(grid: Tensor) -> Tensor:
    """(padded rows, steps, units) -> (strips, steps, words, 16) int32."""
    grid = functional.pad(grid, (0, -grid.shape[-1] % (4 // grid.element_size())))
    words = grid.contiguous().view(torch.int32)
    return words.unflatten(0, (-1, STRIP)).permute(0, 2, 3, 1).contiguous()


# ---- what the codes of a weight become


@dataclass(frozen=True)
class Numbers:
    """What codes of the layout stand for: (number - zero) * 2**-exponent, in units of the scale."""

    name: str  # Spec.numbers
    recode: Tensor | None = None  # (2**bits,) uint8: the code of the layout for each stored one
    zero: float = 0.0
    zero_grid: Tensor | None = None  # (out or 1, groups), in place of zero
    exponent: int = 0
    table: Tensor | None = None  # (out or 1, 2**bits) float32
    offset: Tensor | None = None  # (out, groups) float32
    values: Tensor | None = None  # (2**bits,) int16 of each stored code, where micro-exponents go into them

    def largest(self, dtype: torch.dtype) -> float:
        if self.table is not None:
            return float(self.table.abs().nan_to_num(0, 0, 0).max())
        bits = bits_of_numbers(self.name)
        kind = self.name[:3]
        size = 2.0**bits if kind in ("int", "mag") else 2.0 ** (2 ** (int(self.name[1]) - 1) + 1)
        return size * unit_of(self.name, dtype)


def numbers_of(weight: PackedWeight) -> Numbers:
    """Raises ValueError where a weight has micro-exponents on numbers that are no small integers."""
    found = _of_levels(weight)
    if weight.micro is not None:
        return _with_micro(weight, found)
    table, zero = found.table, weight.zero
    if table is not None:
        if isinstance(zero, Tensor):
            found = replace(found, offset=_product(weight, -zero.float()))
        else:
            found = replace(found, table=table - zero)
    elif found.name[:3] == "int":
        found = _with_zero(weight, found)
    elif isinstance(weight.zero, Tensor) or weight.zero:
        zero = weight.zero if isinstance(weight.zero, Tensor) else torch.full((1, 1), weight.zero)
        found = replace(found, offset=_product(weight, -zero.float().to(weight.scale.device)))
    return _with_offset(weight, found)


def _of_levels(weight: PackedWeight) -> Numbers:
    """Without the weight's zero, offset and micro-exponents."""
    bits, levels = weight.bits, weight.levels
    codes = torch.arange(2**bits, device=weight.packed.device)
    if levels is None:
        sign = 2 ** (bits - 1)
        recode = (codes ^ sign).to(torch.uint8) if weight.signed else None
        return Numbers(f"int{bits}", recode, float(sign if weight.signed else 0))
    if levels.dim() == 1:
        found = integer_levels(levels)
        if found is not None and (weight.micro is not None or bits_of(found[0]) <= bits):
            values, exponent = found
            least = int(values.min())
            recode = (values - least).to(torch.uint8)
            return Numbers(f"int{bits_of(values)}", recode, float(-least), exponent=exponent, values=values)
        for exponent, mantissa in FLOATS.get(bits, ()):
            if _is_float(weight, levels, exponent, mantissa):
                return Numbers(f"e{exponent}m{mantissa}")
    return Numbers(f"tab{bits}", table=levels.float().reshape(-1, 2**bits))


def _is_float(weight: PackedWeight, levels: Tensor, exponent: int, mantissa: int) -> bool:
    """Whether levels are such floats, but for infinities and NaN that no code of the weight asks for."""
    code = torch.arange(2 ** (exponent + mantissa), device=levels.device)
    e, m = code >> mantissa, code & 2**mantissa - 1
    bias = 2 ** (exponent - 1) - 1
    size = torch.ldexp(torch.where(e == 0, m, m + 2**mantissa).float(), e.clamp_min(1) - bias - mantissa)
    wrong = levels.float() != torch.cat([size, -size])
    if bool((wrong & levels.isfinite()).any()):
        return False
    return not bool(wrong.any()) or not any(bool(wrong[codes.int()].any()) for _, codes in _chunks(weight))


def _with_micro(weight: PackedWeight, found: Numbers) -> Numbers:
    """Integers doubled, for halves to be integers too: a level * 2**-micro is (level * 2**(1 - micro)) / 2."""
    integers = found.name[:3] == "int" and not isinstance(weight.zero, Tensor)
    values = found.values
    if integers and values is None:
        values = torch.arange(2**weight.bits, device=weight.packed.device).short() - int(found.zero)
    if values is None or isinstance(weight.zero, Tensor):
        raise ValueError("micro-exponents are taken on integers less one zero point only")
    values = values - weight.zero
    least, most = 2 * int(values.min()), 2 * int(values.max())
    exponent = found.exponent + 1
    bits = (most - min(least, 0)).bit_length()
    if bits <= 8:
        least = min(least, 0)
        return _with_offset(weight, Numbers(f"int{bits}", zero=float(-least), exponent=exponent, values=values))
    if max(-least, most) > 255:
        raise ValueError(f"micro-exponents are taken on integers of up to 8 bits and sign, not {least // 2}")
    return _with_offset(weight, Numbers("mag8", exponent=exponent, values=values))


def _with_zero(weight: PackedWeight, found: Numbers) -> Numbers:
    """A zero point that 16-bit floats hold, differences included, stays one; another is an offset."""
    scale, top = 2**found.exponent, 2 ** bits_of_numbers(found.name) - 1
    if not isinstance(weight.zero, Tensor):
        zero = found.zero + weight.zero * scale
        if -256 <= top - zero <= 256 and abs(zero) <= 256:
            return replace(found, zero=float(zero))
        return replace(found, offset=_product(weight, scale_of(weight).new_full((1, 1), -float(weight.zero))))
    grid = weight.zero.float() * scale + found.zero
    if float(grid.max()) <= 256 and float(grid.min()) >= top - 256:
        return replace(found, zero_grid=grid)
    return replace(found, offset=_product(weight, -weight.zero.float()))


def _with_offset(weight: PackedWeight, found: Numbers) -> Numbers:
    """An offset that is the same multiple of every scale, as in binary formats, is a zero point."""
    if weight.offset is None:
        return found
    offset = weight.offset.float().expand(weight.shape[0], -1)
    if found.name[:3] == "int" and found.zero_grid is None and found.offset is None:
        scale = scale_of(weight).squeeze(-1).expand_as(offset)
        nonzero = scale != 0
        ratio = (offset / scale)[nonzero]
        halves = float((2 * ratio).round().median()) / 2 if ratio.numel() else 0.0
        zero = found.zero - halves * 2**found.exponent
        if bool((scale * halves == offset).all()) and abs(zero) <= 128 and (2 * zero) % 1 == 0:
            return replace(found, zero=zero)
    return replace(found, offset=(offset if found.offset is None else found.offset + offset).contiguous())


def _product(weight: PackedWeight, grid: Tensor) -> Tensor:
    """grid (out or 1, groups or 1) times the scales, (out, groups) float32."""
    return (scale_of(weight).squeeze(-1) * grid).expand(weight.shape[0], weight.groups).contiguous()


# ---- words


def _parts(weight: PackedWeight, numbers: Numbers, spec: Spec) -> tuple[Tensor, Tensor | None]:
    bits = spec.bits
    low, high = [], []
    for start, codes in _chunks(weight):
        made = _recoded(weight, numbers, codes, start)
        low.append(arrange(made, range(low_bits(bits)), spec))
        if high_bits(bits):
            high.append(arrange(made, range(low_bits(bits), bits), spec))
    return torch.cat(low), torch.cat(high) if high else None


def _chunks(weight: PackedWeight) -> Iterator[tuple[int, Tensor]]:
    """The first row, and codes (rows, in), of a multiple of 16 rows at a time."""
    size = max(STRIP, CHUNK // weight.shape[1] // STRIP * STRIP)
    for start in range(0, weight.shape[0], size):
        yield start, codes_of(weight, start, min(start + size, weight.shape[0]))


def _recoded(weight: PackedWeight, numbers: Numbers, codes: Tensor, start: int) -> Tensor:
    """Codes of the layout, (rows, in) int16."""
    if weight.micro is None:
        return (codes if numbers.recode is None else numbers.recode[codes.int()]).short()
    assert numbers.values is not None
    halved = unpack(weight.micro[start : start + len(codes)], 1, weight.groups * 8).repeat_interleave(2, dim=1)
    value = numbers.values[codes.int()] << (1 - halved[:, : codes.shape[1]].short())
    if numbers.name[:3] == "int":
        return value + int(numbers.zero)
    return value.abs() | (value < 0).short() << 8


def arrange(codes: Tensor, taken: range, spec: Spec) -> Tensor:
    """The bits `taken` of codes (rows, in) int16 as words, (strips, blocks, 512) int16, int8 for one bit."""
    if spec.group != spec.padded:
        codes = pad_groups(codes, spec)
    codes = functional.pad(codes, (0, spec.steps * STEP - codes.shape[1], 0, -codes.shape[0] % STRIP))
    parts, low, high = 8 if len(taken) == 1 else 16 // len(taken), low_bits(spec.bits), high_bits(spec.bits)
    # strip, row: bit 3, bits 2 to 0 | block, part, column: bit 4, bit 3, bits 2 and 1, bit 0
    codes = codes.view(codes.shape[0] // STRIP, 2, 8, -1, parts, 2, 2, 4, 2)
    codes = codes.permute(4, 0, 3, 5, 2, 7, 6, 1, 8)  # part | strip, block, half, lane (8, 4), number (2, 2, 2)
    words = torch.zeros(codes.shape[1:], dtype=torch.int16, device=codes.device)
    for part in range(parts):
        shifts = [(bit, place_of(spec.numbers, low, high, part, bit) % 16 - bit) for bit in taken]
        for shift in {shift for _, shift in shifts}:
            mask = sum(2**bit for bit, own in shifts if own == shift)
            words |= (codes[part] & mask) << shift if shift >= 0 else (codes[part] & mask) >> -shift
    words = words.to(torch.int8) if len(taken) == 1 else words
    return words.reshape(words.shape[0], words.shape[1], 512)


# ---- and back


def _origin(weight: PackedWeight, numbers: Numbers) -> Origin | None:
    """Where two codes became one, another one comes back than was there: whoever relies on it must compare."""
    back = None
    if weight.micro is not None:
        return None
    if numbers.recode is not None:
        back = torch.zeros(2 ** bits_of_numbers(numbers.name), dtype=torch.uint8, device=weight.packed.device)
        back[numbers.recode.int()] = torch.arange(len(numbers.recode), dtype=torch.uint8, device=back.device)
    return Origin(weight.bits, weight.trits, weight.packed.dtype, weight.packed.shape[1], back)


def packed_again(
    low: Tensor, high: Tensor | None, spec: Spec, origin: Origin, start: int = 0, stop: int | None = None
) -> Tensor:
    """The rows of strips [start, stop) as the PackedWeight had them, but for what lay behind the last code of a row."""
    stop = len(low) if stop is None else stop
    size = max(1, CHUNK // spec.columns // STRIP)
    if stop - start > size:
        pieces = [(first, min(first + size, stop)) for first in range(start, stop, size)]
        return torch.cat([packed_again(low, high, spec, origin, *piece) for piece in pieces])
    bits = spec.bits
    codes = _disarranged(low[start:stop], range(low_bits(bits)), spec)
    if high is not None:
        codes |= _disarranged(high[start:stop], range(low_bits(bits), bits), spec)
    if spec.group != spec.padded:
        codes = codes[:, : spec.layout_columns].unflatten(1, (-1, spec.padded))[..., : spec.group].flatten(1)
    codes = codes[: spec.rows - STRIP * start, : spec.columns]
    if origin.codes is not None:
        codes = origin.codes[codes.int()]
    if origin.trits:
        codes = functional.pad(codes.short(), (0, -spec.columns % 5)).unflatten(1, (-1, 5))
        data = sum(codes[..., j] * 3**j for j in range(5)).to(torch.uint8)
    else:
        codes = functional.pad(codes.long(), (0, -spec.columns % 8)).unflatten(1, (-1, 8))
        eights = codes[..., 0].clone()
        for j in range(1, 8):
            eights |= codes[..., j] << (origin.bits * j)
        data = eights.contiguous().view(torch.uint8).unflatten(1, (-1, 8))[..., : origin.bits].flatten(1)
    size = origin.width * origin.dtype.itemsize
    return functional.pad(data, (0, max(0, size - data.shape[1])))[:, :size].contiguous().view(origin.dtype)


def _disarranged(words: Tensor, taken: range, spec: Spec) -> Tensor:
    """What `arrange` was given: the bits `taken` of codes (padded rows, steps * 256) int16."""
    parts, low, high = 8 if len(taken) == 1 else 16 // len(taken), low_bits(spec.bits), high_bits(spec.bits)
    words = words.short().view(*words.shape[:2], 2, 8, 4, 2, 2, 2)
    codes = torch.zeros(parts, *words.shape, dtype=torch.int16, device=words.device)
    for part in range(parts):
        for bit in taken:
            codes[part] |= (words >> (place_of(spec.numbers, low, high, part, bit) % 16) & 1) << bit
    codes = codes.permute(1, 7, 4, 2, 0, 3, 6, 5, 8)
    return codes.reshape(STRIP * words.shape[0], -1)


def pad_groups(x: Tensor, spec: Spec) -> Tensor:
    """(..., columns) -> (..., layout_columns): each group filled with zeros to the length that the layout gives it."""
    groups = spec.layout_columns // spec.padded
    x = functional.pad(x, (0, groups * spec.group - spec.columns)).unflatten(-1, (groups, spec.group))
    return functional.pad(x, (0, spec.padded - spec.group)).flatten(-2)


def group_sums(x: Tensor, spec: Spec) -> Tensor:
    """(rows, columns) -> (rows, groups) float32: what offsets are multiplied by."""
    groups = -(-spec.columns // spec.group)
    x = functional.pad(x, (0, groups * spec.group - spec.columns)).unflatten(-1, (groups, spec.group))
    return x.sum(-1, dtype=torch.float32)
