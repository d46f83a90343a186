"""Dense bit streams: codes of 1 to 8 bits, least significant bit first, each row on its own; and ternary digits.

Code i of a row occupies bits [i * bits, (i + 1) * bits) of the row's stream, and the row is padded with zero bits to a
whole byte or word. As little-endian int32 words these are the bytes that compressed-tensors calls `pack-quantized`.

>>> pack_bits(torch.tensor([[3, 0, 5, 2, 7, 4, 1, 6, 3, 0, 5]], dtype=torch.uint8), 3)[0].tolist()
[67, 117, 198, 67, 1]
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (rows, n) uint8, each below 2**bits -> (rows, ceil(n * bits / 8)) uint8."""
    assert codes.dtype == torch.uint8, codes.dtype
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous()
    padded = torch.nn.functional.pad(codes, (0, -n % CODES)) if n % CODES else codes
    eight = padded.view(rows, -1, CODES)
    if bits in (1, 2, 4):
        stream = _pack_within_bytes(eight, bits)
    else:
        words = eight[..., 0].long()
        for i in range(1, CODES):
            words |= eight[..., i].long() << (i * bits)
        stream = words.unsqueeze(-1).view(torch.uint8)[..., :bits]
    return stream.reshape(rows, -1)[:, : -(-n * bits // 8)].contiguous()


def _pack_within_bytes(eight: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    fields = eight.view(*eight.shape[:-1], bits, per_byte)
    stream = fields[..., 0].clone()
    for i in range(1, per_byte):
        stream |= fields[..., i] << (i * bits)
    return stream


def unpack_bits(stream: Tensor, bits: int, n: int) -> Tensor:
    """(rows, at least ceil(n * bits / 8)) uint8 -> the first n unsigned codes of every row, (rows, n) uint8."""
    assert stream.dtype == torch.uint8, stream.dtype
    rows = stream.shape[0]
    stream = stream[:, : -(-n * bits // 8)]
    if bits == 8:
        return stream.contiguous()
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        codes = torch.empty(rows, stream.shape[1], 8 // bits, dtype=torch.uint8, device=stream.device)
        for i in range(8 // bits):
            codes[..., i] = (stream >> (i * bits)) & mask
    else:
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits)).view(rows, -1, bits)
        words = torch.nn.functional.pad(stream, (0, 8 - bits)).view(torch.int64).squeeze(-1)
        codes = torch.empty(*words.shape, CODES, dtype=torch.uint8, device=stream.device)
        for i in range(CODES):
            codes[..., i] = (words >> (i * bits)) & mask
    return codes.view(rows, -1)[:, :n].contiguous()


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
