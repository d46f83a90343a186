"""GPTQ's layout, as AutoGPTQ began it and GPTQModel, vLLM and transformers read it, in its second version.

    qweight  int32 (in * bits / 32, out)      codes 0..2**bits - 1, a dense bit stream down every column
    qzeros   int32 (groups, out * bits / 32)  zero points, a bit stream along every row
    scales   float16 (groups, out)            w = (code - zero) * scale
    g_idx    int32 (in,)                      the group of every input

The first version stores zero points less one, which has no room for zero. Source: GPTQModel, nn_modules/qlinear.
"""

from __future__ import annotations

import re
from typing import Any

import numpy
import torch
from torch import Tensor

from llmquant.errors import PlanError, VerificationError
from llmquant.exchange.model import Matrix, Model, Progress, as_float16
from llmquant.formats import packing
from llmquant.formats.base import Grid
from llmquant.formats.integer import Integer
from llmquant.output import OutputFolder
from llmquant.version import __version__

BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
SIDE = 32  # both sides of a matrix are multiples of it


def check(model: Model) -> list[str]:
    for matrix in model.matrices:
        if reason := _refusal(matrix):
            raise PlanError(f"{matrix.target.name}: GPTQ's files cannot hold it: {reason}")
    return ["read by tools that know GPTQ's second version (gptq_v2): GPTQModel, vLLM"]


def _refusal(matrix: Matrix) -> str | None:
    fmt, (outputs, inputs) = matrix.format, matrix.target.shape
    if not isinstance(fmt, Integer) or fmt.bits not in BITS:
        return f"{fmt.spec} is no integer of {', '.join(map(str, BITS))} bits: use int4:g128:fp16, or leave it dense"
    if fmt.convention == "asym_float":
        return "its zero points are real numbers: use the convention asym"
    if fmt.scale_dtype == torch.float32:
        return "its scales are float32, GPTQ's are float16: quantize to the same format with :fp16"
    if fmt.granularity == "tensor":
        return "it has one scale for all: use channel or groups"
    if not matrix.plain:
        return "it is no plain linear layer"
    if isinstance(fmt.granularity, int) and inputs % fmt.granularity:
        return f"its {inputs} inputs are no multiple of the group {fmt.granularity}"
    if outputs % SIDE or inputs % SIDE:
        return f"its sides {outputs}x{inputs} are no multiples of {SIDE}"
    return None


def write(model: Model, folder: OutputFolder, progress: Progress) -> dict[str, Any]:
    """Repack shard by shard; what was read back is decoded by the layout's own arithmetic. Returns config.json."""
    model.rewrite(folder, _converted, _verify, progress)
    return {**model.config, "quantization_config": _config(model)}


def _converted(matrix: Matrix, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    fmt = matrix.format
    assert isinstance(fmt, Integer)
    codes, grid = fmt.unpack(matrix.named(stored), matrix.target.shape)
    return {matrix.base + suffix: tensor for suffix, tensor in pack(fmt, codes, grid, matrix.target.name).items()}


def pack(fmt: Integer, codes: Tensor, grid: Grid, name: str) -> dict[str, Tensor]:
    """Codes (out, in) and grid as the layout's tensors. Raises PlanError for a scale that float16 cannot hold."""
    scales = as_float16(grid.scale, name, "GPTQ's files")
    middle = 2 ** (fmt.bits - 1)
    unsigned = fmt.element.stored(codes)
    zeros = torch.full_like(grid.scale, middle) if grid.zero is None else grid.zero
    return {
        "qweight": packing.pack_words(unsigned, fmt.bits).T.contiguous(),
        "qzeros": packing.pack_words(zeros.T.to(torch.uint8).contiguous(), fmt.bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(codes.shape[1]) // grid.group).to(torch.int32),
    }


def unpack(named: dict[str, Tensor], bits: int, *, first_version: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), zero points (out, groups) and scales (out, groups), all float32, bit by bit."""
    codes = _bits(named["qweight"].T.contiguous(), bits)
    return codes, zero_points(named, bits, first_version=first_version), named["scales"].T.float()


def zero_points(named: dict[str, Tensor], bits: int, *, first_version: bool) -> Tensor:
    """(out, groups) float32"""
    zeros = _bits(named["qzeros"], bits).T[: named["scales"].shape[1]]
    return zeros + 1 if first_version else zeros


def repacked(fmt: Integer, codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """What `unpack` returns as the tensors of an integer format with the convention sym_full or asym."""
    group = fmt.granularity if isinstance(fmt.granularity, int) else codes.shape[1]
    signed = fmt.convention == "sym_full"
    shifted = codes - 2 ** (fmt.bits - 1) if signed else codes
    grid = Grid(scales.contiguous(), None if signed else zeros.contiguous(), group)
    return fmt.pack(shifted.to(fmt.element.code_dtype), grid)


def _bits(words: Tensor, bits: int) -> Tensor:
    """Words (rows, n) int32 -> codes (rows, 32 * n / bits) float32."""
    stream = numpy.unpackbits(words.numpy().view(numpy.uint8), axis=1, bitorder="little")
    whole = stream.shape[1] // bits * bits
    digits = torch.from_numpy(stream[:, :whole]).view(len(words), -1, bits)
    return (digits * 2 ** torch.arange(bits)).sum(-1).float()


def _verify(matrix: Matrix, stored: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    assert isinstance(matrix.format, Integer)
    named = {suffix: read[matrix.base + suffix] for suffix in SUFFIXES}
    codes, zeros, scales = unpack(named, matrix.format.bits)
    group = named["g_idx"].long()
    if not torch.equal((codes - zeros[:, group]) * scales[:, group], matrix.decoded(stored)):
        raise VerificationError(f"{matrix.target.name}: GPTQ's files decode to other values: please report this")


def _config(model: Model) -> dict[str, Any]:
    """The most frequent format for all, and rules of GPTQModel's (vLLM reads them too) for what differs."""
    kinds = [_kind(matrix) for matrix in model.matrices]
    common = max(kinds, key=kinds.count)
    others: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(matrix.target.name)}$": kind
        for matrix, kind in zip(model.matrices, kinds, strict=True)
        if kind != common
    }
    others |= {f"-:^{re.escape(name)}$": {} for name in model.dense_linears() if name != "lm_head"}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **common,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmquant:{__version__}"]},
        **({"dynamic": others} if others else {}),
    }


def _kind(matrix: Matrix) -> dict[str, Any]:
    fmt = matrix.format
    assert isinstance(fmt, Integer)
    group = fmt.granularity if isinstance(fmt.granularity, int) else -1
    return {"bits": fmt.bits, "group_size": group, "sym": fmt.convention != "asym"}
