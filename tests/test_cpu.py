"""The compiled loops apart from what test_kernels.py sees of them: other processors, threads, what is kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmquant import benchmark, cpu
from llmquant_kernels import decode
from llmquant_kernels.cpu_compiled import encode

# As on a processor with vectors twice, or half, as long as here: LLVM makes do with what there is.
ON_ANOTHER_PROCESSOR = """
import sys
import numba.core.codegen
real = numba.core.codegen.get_host_cpu_features
wide = {"+avx512f", "+avx512bw", "+avx512dq", "+avx512vl"}
here = wide <= {*real().split(",")}
numba.core.codegen.get_host_cpu_features = lambda: "" if here else ",".join(wide)
import torch
import llmquant.cpu.vectors
assert llmquant.cpu.vectors.LANES == (8 if here else 16) and not llmquant.cpu.DOTS
numba.core.codegen.get_host_cpu_features = real
from llmquant import benchmark
from llmquant_kernels import decode
from llmquant_kernels.cpu_compiled import CpuCompiled
for spec in sys.argv[1:]:
    for shape in ((64, 256), (37, 172)):
        weight = benchmark.of_shape(spec, shape, torch.float32)
        exact = decode(weight, torch.float64)
        for dtype in (torch.float32, torch.bfloat16):
            prepared = CpuCompiled(weight, dtype, keep_decoded=True)
            assert torch.equal(prepared.decoded, exact.to(dtype)), spec
            for rows in (1, 2, 3, 8, 11):
                x = torch.randn(rows, shape[1]).to(dtype)
                expected = x.double() @ exact.T
                error = (prepared.linear(x).double() - expected).norm() / expected.norm()
                assert error < (1e-6 if dtype == torch.float32 else 5e-3), (spec, shape, rows, error)
"""


def test_on_another_processor(tmp_path: Path) -> None:
    specs = ["int4:g128", "int3:g32:asym", "int6:g64", "nvfp4", "mx9", "nf4:g64", "mxfp8_e4m3", "ternary:g32"]
    subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_PROCESSOR, *specs],
        check=True,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
    )
    indices = [path.stem for path in tmp_path.rglob("*run_*.nbi")]
    codes = [path.name.rsplit(".", 2)[0] for path in tmp_path.rglob("*run_*.nbc")]
    assert len(indices) > 2 * len(specs)
    assert sorted(codes) == sorted(indices), "loops that share an index can be taken for each other"


def test_where_torch_has_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = benchmark.of_shape("int4:g64", (256, 512), torch.float32)
    encoded = encode(weight)
    x, before = torch.randn(3, 512), torch.get_num_threads()
    expected = x.double() @ decode(weight, torch.float64).t()
    monkeypatch.setattr(cpu, "_team", lambda: cpu._in_plain_threads)
    torch.set_num_threads(3)
    try:
        found = cpu.multiply(cpu.prepare(encoded), x)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_threads_are_those_of_torch() -> None:
    assert cpu._team() is not cpu._in_plain_threads
