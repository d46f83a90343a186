"""compressed-tensors: what vLLM, SGLang and plain transformers load.

Where it has a format, llmquant's files have its very tensors and bytes: an export links the shards and rewrites
config.json, an import does the same the other way round. The package itself decodes every matrix to check it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llmquant import formats
from llmquant.errors import PlanError, VerificationError
from llmquant.exchange.extras import extra
from llmquant.exchange.model import Matrix, Model, Progress
from llmquant.formats import Format, options
from llmquant.formats.floating import FP8, SIDE
from llmquant.formats.integer import Integer
from llmquant.formats.mx import BLOCK as MX_BLOCK
from llmquant.formats.mx import MX
from llmquant.formats.nvfp4 import BLOCK as NVFP4_BLOCK
from llmquant.formats.nvfp4 import NVFP4
from llmquant.output import OutputFolder

METHOD = "compressed-tensors"
MX_NAMES = {4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"}


def arguments(fmt: Format) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs of a format, as config.json has them."""
    granularity = getattr(fmt, "granularity", None)
    strategy = "group" if isinstance(granularity, int) else granularity
    found: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False}
    if isinstance(granularity, int):
        found["group_size"] = granularity
    if isinstance(fmt, Integer):
        return {**found, "num_bits": fmt.bits, "type": "int", "symmetric": fmt.convention != "asym"}
    if isinstance(fmt, MX):
        return {**found, "num_bits": fmt.element.bits, "group_size": MX_BLOCK, "scale_dtype": "torch.uint8"}
    if isinstance(fmt, NVFP4):
        scale = {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
        return {**found, "group_size": NVFP4_BLOCK, **scale}
    assert isinstance(fmt, FP8), fmt.spec
    return {**found, "num_bits": 8, **({"block_structure": [SIDE, SIDE]} if granularity == "block" else {})}


def format_of(arguments: dict[str, Any], scale: torch.dtype) -> Format:
    """The format of weights with these QuantizationArgs and scales of this type. Raises PlanError: there is none."""
    kind, bits, strategy = arguments.get("type", "int"), arguments.get("num_bits", 8), arguments.get("strategy")
    group = arguments.get("group_size")
    if strategy is None:
        strategy = "group" if group else "tensor"
    granularity = f"g{group}" if strategy == "group" else strategy
    if kind == "int" and strategy in ("group", "channel") and bits in range(2, 9):
        convention = None if arguments.get("symmetric", True) else "asym"
        return formats.get(options.spec(f"int{bits}", granularity, convention, scale))
    if kind == "float" and scale == torch.uint8 and group == MX_BLOCK and bits in MX_NAMES:
        return formats.get(MX_NAMES[bits])
    if kind == "float" and (bits, strategy, group) == (4, "tensor_group", NVFP4_BLOCK):
        return formats.get("nvfp4")
    sides = list(arguments.get("block_structure") or [SIDE, SIDE])
    if kind == "float" and bits == 8 and strategy in ("channel", "tensor", "block") and sides == [SIDE, SIDE]:
        return formats.get(options.spec("fp8_e4m3", strategy, None if scale == torch.float32 else scale))
    raise PlanError(f"no format here has weights of {arguments} with scales of {scale}")


# ---- export


def check(model: Model) -> list[str]:
    extra("compressed_tensors")
    for matrix in model.matrices:
        if reason := _refusal(matrix, model.dtype):
            raise PlanError(f"{matrix.target.name}: compressed-tensors cannot hold it: {reason}")
    return [*_fused(model), *_readers(model)]


def _refusal(matrix: Matrix, dtype: torch.dtype) -> str | None:
    fmt, columns = matrix.format, matrix.target.shape[1]
    if fmt.compressed_tensors is None:
        return f"it has no {fmt.spec}: use int2 to int8 in groups or channels, mxfp4, mxfp8_e4m3, nvfp4 or fp8_e4m3"
    if not matrix.plain:
        return "it is no plain linear layer"
    if isinstance(fmt, Integer) and fmt.granularity == "tensor":
        return "its integers have a scale per channel or group: use int8:channel"
    group = getattr(fmt, "granularity", None)
    if isinstance(group, int) and columns % group:
        return f"its {columns} inputs are no multiple of the group {group}"
    if isinstance(fmt, Integer) and fmt.scale_dtype != dtype:
        return f"its scales are {fmt.scale_dtype}, and readers cast them to the model's {dtype}"
    return None


def _readers(model: Model) -> Iterator[str]:
    """Notes on what one reader takes and another does not."""
    if any(isinstance(matrix.format, Integer) and matrix.format.convention == "asym" for matrix in model.matrices):
        yield (
            "zero points: transformers 5.17 loads them, 5.23 with compressed-tensors 0.20 stops at a shape mismatch of "
            "its own making; without --asym both load"
        )
    used = {matrix.format for matrix in model.matrices if isinstance(matrix.format, FP8)}
    for spec in sorted(fmt.spec for fmt in used if fmt.scale_dtype != model.dtype):
        yield (
            f"{spec}: transformers casts its scales to the model's {model.dtype}, which changes weights by their "
            "rounding; vLLM keeps them"
        )


def _fused(model: Model) -> Iterator[str]:
    """Notes on layers that vLLM computes as one and which differ in format."""
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for owner, some in groupby(model.matrices, lambda matrix: matrix.target.name.rpartition(".")[0]):
            specs = {m.target.name.rpartition(".")[2]: m.format.spec for m in some}
            if len({specs.get(part) for part in parts}) > 1:
                yield f"{owner}: {', '.join(parts)} differ in format: vLLM, which computes them as one, refuses that"
                break


def write(model: Model, folder: OutputFolder, progress: Progress) -> dict[str, Any]:
    """Link every shard, after the package's own reader has decoded its matrices. Returns config.json."""
    quantization = config(model)
    _validated(quantization)
    model.link(folder, _verify, progress)
    return {**model.config, "quantization_config": quantization}


def config(model: Model) -> dict[str, Any]:
    """The `quantization_config`: a group per format; modules by name where there are several formats."""
    members: dict[Format, list[str]] = {}
    for matrix in model.matrices:
        members.setdefault(matrix.format, []).append(matrix.target.name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(members) == 1 else names,
            "weights": arguments(fmt),
            "input_activations": None,
            "output_activations": None,
            "format": fmt.compressed_tensors,
        }
        for number, (fmt, names) in enumerate(members.items())
    }
    kinds = {fmt.compressed_tensors for fmt in members}
    return {
        "quant_method": METHOD,
        "format": next(iter(kinds)) if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": model.dense_linears(),
        "kv_cache_scheme": None,
    }


def _validated(quantization: dict[str, Any]) -> None:
    """By the package's own model of it."""
    theirs = extra("compressed_tensors.quantization").QuantizationConfig
    theirs.model_validate({key: value for key, value in quantization.items() if key != "quant_method"})


def _verify(matrix: Matrix, stored: dict[str, Tensor]) -> None:
    """What the package decodes must be what llmquant decodes, to the rounding of the 16 bits in which it multiplies."""
    ours = matrix.decoded(stored)
    theirs = decoded(matrix.format, matrix.named(stored)).float()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2.0**-8, atol=0):
        raise VerificationError(f"{matrix.target.name}: compressed-tensors decodes other values: please report this")


def decoded(fmt: Format, named: dict[str, Tensor]) -> Tensor:
    """The weight (out, in) as the package decodes it."""
    quantization, base = extra("compressed_tensors.quantization"), extra("compressed_tensors.compressors.base")
    weights = quantization.QuantizationArgs(**arguments(fmt))
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = base.BaseCompressor.get_value_from_registry(fmt.compressed_tensors)
    return compressor.decompress(dict(named), scheme)["weight"]
