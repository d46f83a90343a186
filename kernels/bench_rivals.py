"""Other kernels for products with quantized weights, as `bench_gpu.py` times them beside ours.

An adapter is given a case and x, and makes as many weights as are timed in turn: calls, and the weight (out, in)
float32 that the first of them multiplies by, for its result to be compared with float64. It says why where it cannot:
the package is not installed, or has no such numbers. Each names the version whose source it was written against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128
MX_GROUP = 32


class Skipped(Exception):
    """Why there is nothing to time."""


class Task(NamedTuple):
    kind: str
    shape: tuple[int, int]  # (out, in)
    copies: int  # weights to go through, and how many of 16-bit floats
    dense_copies: int


Calls = tuple[Sequence[Callable[[], Tensor]], Tensor]


def installed(package: str) -> None:
    if find_spec(package) is None:
        raise Skipped("not installed")


def only(task: Task, *kinds: str) -> None:
    if task.kind not in kinds:
        raise Skipped(f"has no {task.kind}")


def whole_groups(task: Task, group: int, rows: int = 1) -> None:
    if task.shape[1] % group or task.shape[0] % rows:
        raise Skipped(f"takes multiples of {rows} rows and {group} columns")


def integers(task: Task, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in) uint8 of 4 bits less 8, scales (out, groups) of x's type, and what they stand for, float32."""
    out, columns = task.shape
    codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=x.device)
    scale = (torch.rand(out, columns // GROUP, device=x.device) / columns**0.5).to(x.dtype)
    return codes, scale, (codes.float() - 8) * scale.float().repeat_interleave(GROUP, dim=1)


def several(task: Task, x: Tensor, make: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> Calls:
    """make: of codes and scales, as `integers` gives them."""
    calls, exact = [], None
    for _ in range(task.copies):
        codes, scale, values = integers(task, x)
        exact = values if exact is None else exact
        calls.append(make(codes, scale))
    assert exact is not None
    return calls, exact


def cublas(task: Task, x: Tensor) -> Calls:
    weights = [torch.randn(task.shape, dtype=x.dtype, device=x.device) for _ in range(task.dense_copies)]
    return [partial(functional.linear, x, w) for w in weights], weights[0].float()


def tinygemm(task: Task, x: Tensor) -> Calls:
    """torch's own, `aten::_weight_int4pack_mm`, as torch 2.11 to 2.13 have it: w = (q - 8) * s + z."""
    only(task, "int4")
    whole_groups(task, GROUP, 8)
    if x.dtype != torch.bfloat16:
        raise Skipped("takes bfloat16 only")

    def make(codes: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        grid = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()
        return partial(torch.ops.aten._weight_int4pack_mm, x, packed, GROUP, grid)

    return several(task, x, make)


def gemlite(task: Task, x: Tensor) -> Calls:
    """gemlite 0.6.0.post2: `helper.A16W4_HQQ_INT.from_weights(W_q, scales, zeros)`, w = (q - z) * s.

    It times its own settings at the first call, for a minute or more: "fast" tries the fewest.
    """
    installed("gemlite")
    only(task, "int4")
    whole_groups(task, GROUP)
    import_module("gemlite.triton_kernels.config").set_autotune("fast")
    processor = import_module("gemlite.helper").A16W4_HQQ_INT(device=str(x.device), dtype=x.dtype)

    def make(codes: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        return partial(processor.from_weights(codes, scale, torch.full_like(scale, 8)), x)

    return several(task, x, make)


def conch(task: Task, x: Tensor) -> Calls:
    """conch-triton-kernels 1.3: `mixed_precision_gemm(x, w_q_packed (in / 8, out) int32, w_s (groups, out), ...)`."""
    installed("conch")
    only(task, "int4")
    whole_groups(task, GROUP)
    multiply = import_module("conch.ops.quantization.gemm").mixed_precision_gemm

    def make(codes: Tensor, scale: Tensor) -> Callable[[], Tensor]:
        eights = codes.t().int().unflatten(0, (-1, 8))
        packed = eights[:, 0].clone()
        for i in range(1, 8):
            packed |= eights[:, i] << (4 * i)
        return partial(multiply, x, packed.contiguous(), scale.t().contiguous(), None, 4, 8, GROUP)

    return several(task, x, make)


HUMMING = {
    "int2": {"dtype": "int2", "group_size": GROUP},
    "int3": {"dtype": "int3", "group_size": GROUP},
    "int4": {"dtype": "int4", "group_size": GROUP},
    "int6": {"dtype": "int6", "group_size": GROUP},
    "int8": {"dtype": "int8", "group_size": GROUP},
    "mxfp4": {"dtype": "float4e2m1", "group_size": MX_GROUP, "scale_dtype": "float8e8m0"},
}


def humming(task: Task, x: Tensor) -> Calls:
    """humming-kernels 0.1.20: `HummingLayer(shape_n=, shape_k=, weight_config=, torch_dtype=)`, compiled at first use.

    It quantizes a dense weight itself: its error here is that of the rounding, not of the kernel alone.
    """
    installed("humming")
    only(task, *HUMMING)
    whole_groups(task, GROUP)
    layer_of = import_module("humming.layer").HummingLayer
    calls, exact = [], None
    for _ in range(task.copies):
        weight = torch.randn(task.shape, dtype=x.dtype, device=x.device)
        exact = weight.float() if exact is None else exact
        config = dict(HUMMING[task.kind])
        layer = layer_of(shape_n=task.shape[0], shape_k=task.shape[1], weight_config=config, torch_dtype=x.dtype)
        layer = layer.to(x.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        calls.append(partial(layer, x))
    assert exact is not None
    return calls, exact


def torchao(task: Task, x: Tensor) -> Calls:
    """torchao 0.18: `quantize_(linear, Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"))` (tinygemm's).

    It rounds a dense weight itself, and its plain packing needs packages of other projects.
    """
    installed("torchao")
    only(task, "int4", "int8")
    whole_groups(task, GROUP, 8)
    module = import_module("torchao.quantization")
    config = module.Int8WeightOnlyConfig(version=2)
    if task.kind == "int4":
        config = module.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    calls, exact = [], None
    for _ in range(task.copies):
        layer = torch.nn.Linear(task.shape[1], task.shape[0], bias=False, dtype=x.dtype, device=x.device)
        exact = layer.weight.detach().float() if exact is None else exact
        module.quantize_(layer, config)
        calls.append(partial(layer, x))
    assert exact is not None
    return calls, exact


def bitsandbytes(task: Task, x: Tensor) -> Calls:
    """bitsandbytes 0.50.2: `quantize_4bit(w, blocksize=, quant_type=)`, `matmul_4bit(x, codes, quant_state=)`.

    It rounds a dense weight itself.
    """
    installed("bitsandbytes")
    only(task, "nf4")
    whole_groups(task, 64)
    module = import_module("bitsandbytes")
    quantize = import_module("bitsandbytes.functional").quantize_4bit
    calls, exact = [], None
    for _ in range(task.copies):
        weight = torch.randn(task.shape, dtype=x.dtype, device=x.device)
        exact = weight.float() if exact is None else exact
        codes, state = quantize(weight, blocksize=64, quant_type="nf4")
        calls.append(partial(module.matmul_4bit, x, codes, quant_state=state))
    assert exact is not None
    return calls, exact


ADAPTERS: dict[str, Callable[[Task, Tensor], Calls]] = {
    "cublas": cublas,
    "tinygemm": tinygemm,
    "gemlite": gemlite,
    "conch": conch,
    "humming": humming,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
}
DISTRIBUTIONS = {
    "gemlite": "gemlite",
    "conch": "conch-triton-kernels",
    "humming": "humming-kernels",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
}


def versions() -> dict[str, str]:
    """{rival: its version, or that it is not installed}."""
    found = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
