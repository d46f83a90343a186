"""Compile the kernels for GPUs that are not there and count what their inner loops are made of.

    python kernels/count.py                                    # sm_80, sm_90 and sm_100
    python kernels/count.py --capability 90 --formats int4 mxfp4

Needs neither a GPU nor CUDA: triton brings its own assembler and disassembler. Figures are for one warp and one step of
the inner loop, per weight that the warp decodes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmquant_kernels import triton_kernels as kernels
from llmquant_kernels.triton_layout import Spec
from llmquant_kernels.triton_ops import FUSED
from llmquant_kernels.triton_settings import Device, Settings, is_even, settings_for

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DEVICES = {  # processors, KiB of shared memory for a program
    80: (108, 163),  # A100
    86: (82, 99),
    89: (128, 99),
    90: (132, 227),  # H100, H200
    100: (148, 227),  # B200
    120: (170, 99),
}
# The shape decides only what divides by 16 and whether columns are missing.
ROWS, COLUMNS = 4096, 4096


def spec_of(numbers: str, scale: str = "bf16", units: int = 2, zero: float = 0.0, columns: int = COLUMNS) -> Spec:
    group = columns if units == 0 else 256 // units
    return Spec(ROWS, columns, group, group, numbers, scale, units, zero, 0)


FORMATS = {
    "int4": spec_of("int4", zero=8.0),
    "int4 zeros": spec_of("int4", zero=float("nan")),
    "int4 ragged": spec_of("int4", zero=8.0, columns=4000),
    "int2": spec_of("int2", zero=2.0),
    "int3": spec_of("int3", zero=4.0),
    "int5": spec_of("int5", zero=16.0),
    "int6": spec_of("int6", zero=32.0),
    "int8": spec_of("int8", zero=128.0),
    "int8 row": spec_of("int8", "fp32", 0, 128.0),
    "int1": spec_of("int1", zero=0.5),
    "int4 g32": spec_of("int4", units=8, zero=8.0),
    "mxfp4": spec_of("e2m1", "e8m0", 8),
    "mxfp6_e2m3": spec_of("e2m3", "e8m0", 8),
    "mxfp8_e4m3": spec_of("e4m3", "e8m0", 8),
    "mxint8": spec_of("int8", "e8m0", 8, 128.0),
    "nvfp4": spec_of("e2m1", "e4m3", 16),
    "mx6": spec_of("int6", "e8m0", 16, 30.0),
    "mx9": spec_of("mag8", "e8m0", 16),
    "vsq4": spec_of("int4", "u8", 16, 8.0),
    "fp8 row": spec_of("e4m3", "fp32", 0),
    "nf4": spec_of("tab4", "fp32", 4),
    "kmeans4 row": spec_of("row4", "fp32", 0),
    "kmeans3 row": spec_of("row3", "fp32", 0),
    "kmeans4 g64": spec_of("own4", "bf16", 4),
}


def device(capability: int) -> Device:
    processors, shared = DEVICES[capability]
    return Device("", processors, capability, shared * 1024)


def compile_kernel(
    name: str, spec: Spec, settings: Settings, capability: int, f16: bool = False, experts: int = 0
) -> Any:
    """The compiled kernel as `triton_ops.launch` would ask for it: x with rows of a multiple of 16 values, no bias."""
    zeros = spec.zero != spec.zero
    wide = "*fp16" if f16 else "*bf16"
    exact = spec.scale in ("fp16" if f16 else "bf16", "e8m0", "e4m3", "u8")
    constants: dict[str, Any] = {
        "NUMBERS": spec.numbers,
        "SCALE": spec.scale,
        "UNITS": spec.units,
        "ZERO": 0.0 if zeros else spec.zero,
        "HAS_ZERO": zeros,
        "ASM": True,
    }
    if name == "dequantize":
        constants |= {"HAS_OFFSET": False, "F16": f16}
    else:
        constants |= {
            "BM": settings.bm,
            "SCALED": settings.scaled,
            "EXACT": exact,
            "BOOST": 1.0,
            "HAS_BIAS": False,
            "HAS_OFFSET": False,
            "EXPERTS": experts,
            "EVEN": is_even(settings, spec),
            "STAGES": settings.stages,
        }
        tile = {"S": settings.bn // 16, "T": settings.warps}
        constants |= tile if name == "gemv" else {"BN": settings.bn, "SPLIT": settings.split}
    one_bit, high = spec.bits == 1, {3: "*i8", 5: "*i8", 6: "*i16", 9: "*i8"}.get(spec.bits, "*i16")
    low = "*i8" if one_bit else "*i16"
    types = {
        "x_ptr": wide,
        "o_ptr": wide,
        "low_ptr": low,
        "high_ptr": low if one_bit else high,
        "scale_ptr": "*i32",
        "zero_ptr": "*i32",
        "table_ptr": "*fp32" if spec.numbers[:3] in ("tab", "own") else "*i32",
        "row_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "offset_ptr": "*fp32",
        "work_ptr": "*fp32",
        "ends_ptr": "*i32",
        "sums_ptr": "*fp32",
    }
    function = getattr(kernels, name)
    names = function.arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in names}
    odd = {"M", "STEPS", "SHARE", "GROUPS", "stride_bias"}
    attrs = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg not in constants and arg not in odd}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": settings.warps if name != "dequantize" else 1, "num_stages": settings.stages}
    options |= FUSED
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@dataclass(frozen=True)
class Counts:
    """What a kernel needs, and its inner loop: the one with the most arithmetic."""

    registers: int
    stack: int  # bytes
    shared: int  # bytes
    warps: int
    weights: float  # that a warp decodes in one pass of the loop
    loop: tuple[str, ...]  # opcodes with their suffixes, as "LDGSTS.E.BYPASS.128"

    @property
    def per_weight(self) -> float:
        """Instructions."""
        return len(self.loop) / self.weights * 32

    def number(self, *names: str) -> int:
        """Instructions of the loop with one of these first names."""
        return sum(op.split(".")[0] in names for op in self.loop)

    def loads(self, name: str) -> str:
        """Of 16, 8 and fewer bytes."""
        found = [op for op in self.loop if op.split(".")[0] == name]
        wide, half = (sum(f".{bits}" in op for op in found) for bits in (128, 64))
        return f"{wide}/{half}/{len(found) - wide - half}"

    @property
    def tensor_core(self) -> str:
        return "/".join(str(self.number(name)) for name in ("HGMMA", "HMMA", "UTCHMMA"))


def count(name: str, spec: Spec, settings: Settings, capability: int, f16: bool = False, experts: int = 0) -> Counts:
    compiled = compile_kernel(name, spec, settings, capability, f16, experts)
    registers, stack, loop = _loop_of(compiled.asm["cubin"])
    # Each of the gemv's warps decodes 256 columns of all rows; the gemm's share out the tile.
    weights = settings.bn * 256 / (1 if name == "gemv" else settings.warps) if name != "dequantize" else 16 * 256
    return Counts(registers, stack, compiled.metadata.shared, settings.warps, weights, tuple(loop))


def _loop_of(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack, and the opcodes of the main loop, or of all where there is no loop."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", path)
        text = _run("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage}")
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i:
            loops.append(lines[labels[target[1]] : i + 1])
    opcodes = [[line.split()[0] for line in body] for body in loops or [lines]]
    work = {"LOP3", "HMMA", "HGMMA", "UTCHMMA", "HFMA2"}
    main = max(opcodes, key=lambda body: sum(op.split(".")[0] in work for op in body))
    return int(found[1]), int(found[2]), main


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def programs(counts: Counts) -> int:
    """Programs of a kernel that one processor of sm_90 or sm_100 holds."""
    registers = -(-counts.registers // 8) * 8 * counts.warps * 32
    return min(227 * 1024 // (counts.shared + 1024), 65536 // registers, 64 // counts.warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100], choices=DEVICES)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128], help="of the activations")
    parser.add_argument("--fp16", action="store_true", help="float16 activations in place of bfloat16")
    args = parser.parse_args()
    heads = ["per weight", "loop", "registers", "stack", "shared KiB", "programs", "HGMMA/HMMA/UTCHMMA"]
    heads += ["LDGSTS 16/8/4", "LDS", "LDG", "STS", "kinds"]
    for capability in args.capability:
        print(f"\nsm_{capability}, triton {triton.__version__}\n| format | rows | kernel | " + " | ".join(heads) + " |")
        print("|---" * (3 + len(heads)) + "|")
        for name in args.formats:
            for rows in args.rows:
                spec = FORMATS[name]
                settings = settings_for(rows, spec, device(capability))
                if settings.kernel == "dense":
                    continue
                found = count(settings.kernel, spec, settings, capability, args.fp16)
                kinds = Counter(op.split(".")[0] for op in found.loop).most_common(6)
                tile = f"{settings.kernel} {settings.bn}x{settings.bm} w{settings.warps}" + " scaled" * settings.scaled
                cells = [f"{found.per_weight:.2f}", len(found.loop), found.registers, found.stack]
                cells += [f"{found.shared / 1024:.0f}", programs(found), found.tensor_core]
                cells += [*(found.loads(op) for op in ("LDGSTS", "LDS", "LDG")), found.number("STS", "STSM")]
                cells.append(" ".join(f"{kind} {number}" for kind, number in kinds))
                print(f"| {name} | {rows} | {tile} | " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
