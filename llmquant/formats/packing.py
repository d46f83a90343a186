"""Dense bit streams: codes of 1 to 8 bits, least significant bit first, each row on its own; and ternary digits.

Code i of a row occupies bits [i * bits, (i + 1) * bits) of the row's stream, and the row is padded with zero bits to a
whole byte or word. As little-endian int32 words these are the bytes that compressed-tensors calls `pack-quantized`.

>>> pack_bits(torch.tensor([[3, 0, 5, 2, 7, 4, 1, 6, 3, 0, 5]], dtype=torch.uint8), 3)[0].tolist()
[67, 117, 198, 67, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmquant.formats.base import few_rows

CODES = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (rows, n) uint8, each below 2**bits -> (rows, ceil(n * bits / 8)) uint8."""
    assert codes.dtype == torch.uint8, codes.dtype
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    stream = torch.empty(rows, -(-n * bits // 8), dtype=torch.uint8, device=codes.device)
    for some in few_rows(rows, n, codes.device):
        # A copy with strides of its own: a lone row can have any, and pass for contiguous.
        eights = codes.new_zeros(len(codes[some]), -(-n // CODES) * CODES)
        eights[:, :n] = codes[some]
        packed = _squeeze(eights.view(torch.int64), bits).unsqueeze(-1).view(torch.uint8)[..., :bits]
        stream[some] = packed.flatten(1)[:, : stream.shape[1]]
    return stream


def unpack_bits(stream: Tensor, bits: int, n: int) -> Tensor:
    """(rows, at least ceil(n * bits / 8)) uint8 -> the first n unsigned codes of every row, (rows, n) uint8."""
    assert stream.dtype == torch.uint8, stream.dtype
    rows, eights = stream.shape[0], -(-n // CODES)
    if bits == 8:
        return stream[:, :n].contiguous()
    stream = stream[:, : eights * bits]
    codes = torch.empty(rows, n, dtype=torch.uint8, device=stream.device)
    for some in few_rows(rows, n, stream.device):
        packed = torch.nn.functional.pad(stream[some], (0, eights * bits - stream.shape[1])).unflatten(1, (-1, bits))
        words = torch.nn.functional.pad(packed, (0, CODES - bits)).view(torch.int64).squeeze(-1)
        codes[some] = _spread(words, bits).view(torch.uint8)[:, :n]
    return codes


def _squeeze(eights: Tensor, bits: int) -> Tensor:
    """int64 of eight codes, one to the byte, -> int64 with the eight side by side in its low bits.

    Neighbours are brought together in pairs, then pairs, then fours: three steps whatever the bits.
    """
    for lane in (8, 16, 32):
        held = bits * lane // 8
        low, high = _masks(lane, held)
        eights = eights.bitwise_and(low).bitwise_or_(eights.bitwise_right_shift(lane - held).bitwise_and_(high))
    return eights


def _spread(words: Tensor, bits: int) -> Tensor:
    """The inverse of _squeeze."""
    for lane in (32, 16, 8):
        held = bits * lane // 8
        low, high = _masks(lane, held)
        words = words.bitwise_and(low).bitwise_or_(words.bitwise_and(high).bitwise_left_shift_(lane - held))
    return words


def _masks(lane: int, held: int) -> tuple[int, int]:
    """In every two lanes that are brought together: the bits of the lower one, and those above where the other goes."""
    low = sum(((1 << held) - 1) << at for at in range(0, 64, 2 * lane))
    return low, low << held


def words_per_row(n: int, bits: int) -> int:
    """int32 words that n codes take."""
    return -(-n * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (rows, n) uint8 -> (rows, ceil(n * bits / 32)) int32."""
    stream = pack_bits(codes, bits)
    words = torch.zeros(len(codes), words_per_row(codes.shape[1], bits), dtype=torch.int32, device=codes.device)
    words.view(torch.uint8)[:, : stream.shape[1]] = stream
    return words


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """(rows, words) int32 -> the first n unsigned codes of every row, (rows, n) uint8."""
    assert words.dtype == torch.int32, words.dtype
    if words.stride(-1) != 1 or not words.is_contiguous():  # a lone column can have any stride and pass for contiguous
        words = words.clone(memory_format=torch.contiguous_format)
    return unpack_bits(words.view(torch.uint8), bits, n)


TRITS = 5  # base-3 digits in a byte: 3**5 = 243


def pack_trits(digits: Tensor) -> Tensor:
    """Digits 0..2 (rows, n) uint8 -> (rows, ceil(n / 5)) uint8, each byte sum of digit_j * 3**j; 1 fills the last."""
    rows, n = digits.shape
    five = torch.nn.functional.pad(digits, (0, -n % TRITS), value=1).view(rows, -1, TRITS)
    stream = five[..., 4].clone()
    for j in (3, 2, 1, 0):
        stream.mul_(3).add_(five[..., j])
    return stream


def unpack_trits(stream: Tensor, n: int) -> Tensor:
    """(rows, at least ceil(n / 5)) uint8 -> the first n digits of every row, (rows, n) uint8."""
    digits = torch.empty(*stream.shape, TRITS, dtype=torch.uint8, device=stream.device)
    rest = stream
    for j in range(TRITS):
        quotient = rest.div(3, rounding_mode="floor")
        digits[..., j] = rest - quotient * 3
        rest = quotient
    return digits.flatten(1)[:, :n].contiguous()
