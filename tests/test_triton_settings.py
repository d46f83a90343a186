"""Which settings the Triton kernels run with, and what the bench writes: all of it needs neither triton nor a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

import llmquant_kernels as kernels
from llmquant_kernels import Facts, triton_settings
from llmquant_kernels.triton_layout import Spec
from llmquant_kernels.triton_settings import Device, Settings, heuristic, key, legal, settings_for, shared_bytes

ROOT = Path(__file__).parents[1]
SPEC = Spec(4096, 4096, 128, 128, "int4", "bf16", 2, 8.0, 0)
SPECS = [
    SPEC,
    SPEC._replace(rows=28672, columns=8192),
    SPEC._replace(rows=33, columns=100),
    SPEC._replace(numbers="e2m1", scale="e8m0", units=8, group=32, padded=32),
    SPEC._replace(numbers="int8", scale="fp32", units=16, zero=float("nan")),
    SPEC._replace(numbers="mag8", scale="e8m0", units=16),
    SPEC._replace(numbers="tab4", scale="fp32", units=4),
    SPEC._replace(numbers="int3", units=0),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text)
def test_settings_fit_every_gpu(spec: Spec) -> None:
    for device in (Device("", 108, 80, 163 * 1024), Device("", 82, 86, 99 * 1024), Device(), Device("", 148, 100)):
        for m in (1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 200, 256, 257, 5000):
            settings = settings_for(m, spec, device)
            assert shared_bytes(settings, spec) <= device.shared
            if settings.kernel == "gemv":
                assert m <= settings.bm
            if settings.kernel == "gemm":
                assert settings.scaled or spec.units <= 2
                share = -(-spec.steps // settings.split)
                assert (settings.split - 1) * share < spec.steps  # no program without a step
            assert settings.kernel == "dense" or m <= 256
    assert settings_for(1, SPEC, Device()).kernel == "gemv"
    assert settings_for(64, SPEC, Device()).kernel == "gemm"


def test_measured_settings_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_settings, "TUNED", tmp_path)
    triton_settings._tuned.cache_clear()
    best = Settings("gemm", 16, 64, 4, 4, 2)
    content = {"device": "Some GPU 9", "settings": {key(4, SPEC): best._asdict()}}
    (tmp_path / "some-gpu-9.json").write_text(json.dumps(content))
    here = Device("Some GPU 9")
    assert settings_for(3, SPEC, here) == best  # the next greater number of rows that is tuned
    assert settings_for(4, SPEC, here) == best
    assert settings_for(5, SPEC, here) == settings_for(5, SPEC, Device())
    assert settings_for(4, SPEC._replace(rows=4112), here) == settings_for(4, SPEC._replace(rows=4112), Device())
    triton_settings._tuned.cache_clear()


def test_spec_as_text() -> None:
    for spec in SPECS:
        again = Spec.of(spec.text)
        assert again.text == spec.text
        assert again.bits == spec.bits


def test_a_gpu_gets_this_backend_for_any_weight() -> None:
    pytest.importorskip("triton")
    for facts in (
        Facts(4, (64, 256), 128, device="cuda"),
        Facts(3, (33, 7), 5, zero=None, device="cuda"),
        Facts(4, (33, 7), 16, has_levels=True, device="cuda"),
        Facts(8, (33, 7), 16, has_levels=True, integer_bits=8, has_micro=True, device="cuda"),
    ):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert kernels.choose(facts, dtype)[0] == "triton"
    name, reasons = kernels.choose(Facts(4, (64, 256), 16, has_levels=True, has_micro=True, device="cuda"), torch.half)
    assert name == "reference"
    assert "micro-exponents on integers only" in reasons["triton"]


def test_nothing_of_triton_is_imported_before_a_gpu_is_asked_for() -> None:
    code = "import sys, llmquant_kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


RECORD: dict[str, Any] = {
    "kind": "int4",
    "shape": [4096, 4096],
    "rows": 1,
    "microseconds": 4.0,
    "share": 0.5,
    "error": 1e-3,
    "others": {"cublas": 10.0, "tinygemm": None, "torchao": "RuntimeError: no"},
}
FAILED = {"kind": "int4", "shape": [4096, 4096], "rows": 2, "failed": "OutOfMemoryError: no"}


def test_tables_of_the_bench() -> None:
    import bench_gpu

    records = [FAILED, RECORD, {**RECORD, "rows": 16, "others": {"cublas": 2.0}}, {**RECORD, "kind": "nf4", "rows": 16}]
    assert bench_gpu.table(records).splitlines() == [
        "| speed-up over cublas | 1 | 16 |",
        "|---|---|---|",
        "| int4 4096x4096 | 2.50 | 0.50 |",
        "| nf4 4096x4096 | - | 2.50 |",
    ]
    assert bench_gpu.table([RECORD], "torchao").splitlines()[-1] == "| int4 4096x4096 | - |"
    said = bench_gpu.line(RECORD)
    assert "4.0 us, " in said
    assert "cublas 2.50x" in said
    assert "torchao" not in said


def test_candidates_are_legal_and_begin_with_the_heuristic() -> None:
    import bench_gpu

    for rows in (1, 16, 64, 256):
        found = list(bench_gpu.candidates(rows, SPEC, Device()))
        assert found[0] == legal(heuristic(rows, SPEC, Device()), SPEC, Device())
        assert len(found) == len(set(found)) > 10
        assert all(legal(settings, SPEC, Device()) == settings for settings in found)


def test_the_plan_of_the_bench_needs_no_gpu() -> None:
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), "--suite", "--kinds", "int4", "nf4", "--dry-run"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "int4 28672x8192, rows 1 2 4 8 16 32 64 128 256 2048" in found.stdout
    assert found.stdout.splitlines()[-1] == "100 cases"
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), "--session", "--dry-run"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = found.stdout.splitlines()
    assert said[0].startswith("int4 4096x4096, rows 1 16 64")
    assert "experiment, rows 1: gemv 16x8 w8" in found.stdout
    assert any(text.startswith("beside: gemlite ") for text in said)


def test_records_are_on_the_disk_when_they_are_made(tmp_path: Path) -> None:
    import bench_gpu

    journal = bench_gpu.Journal(tmp_path / "results" / "gpu.json", {"device": "one"})
    for number in range(2):
        journal.note("records", {"number": number})
        assert json.loads(journal.path.read_text())["records"][-1] == {"number": number}
    assert [path.name for path in journal.path.parent.iterdir()] == ["gpu.json"]


def module(name: str, monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    """A package that there is for the time of a test."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        made = types.ModuleType(".".join(parts[:i]))
        made.__spec__ = ModuleSpec(made.__name__, None)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    vars(made).update(contents)


def test_others_are_given_the_weights_that_they_are_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layouts that their sources document decoded by hand, in place of their kernels."""
    import bench_gpu
    import bench_rivals

    def conch(x: Any, packed: Any, scale: Any, zero: Any, bits: int, bias: int, group: int) -> torch.Tensor:
        assert (zero, bits, bias, group, packed.dtype) == (None, 4, 8, 128, torch.int32)
        w = torch.empty(256, 24)
        for k in range(256):
            w[k] = ((packed[k // 8] >> 4 * (k % 8) & 15) - 8) * scale[k // 128].float()
        return (x.float() @ w).to(x.dtype)

    class Processor:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            assert (device, dtype) == ("cpu", torch.bfloat16)

        def from_weights(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> Any:
            assert codes.numel() // scale.numel() == 128
            w = (codes.float() - zero.float().repeat_interleave(128, 1)) * scale.float().repeat_interleave(128, 1)
            return lambda x: (x.float() @ w.T).to(x.dtype)

    module("conch.ops.quantization.gemm", monkeypatch, mixed_precision_gemm=conch)
    module("gemlite.triton_kernels.config", monkeypatch, set_autotune=lambda mode: None)
    module("gemlite.helper", monkeypatch, A16W4_HQQ_INT=Processor)
    task, x = bench_rivals.Task("int4", (24, 256), 2, 1), torch.randn(3, 256).bfloat16()
    for name in ("conch", "gemlite", "cublas"):
        calls, exact = bench_rivals.ADAPTERS[name](task, x)
        assert exact.shape == task.shape
        assert bench_gpu.error_of(calls[0](), x, exact) < 5e-3, name
    for wrong, name in ((task._replace(kind="mx6"), "conch"), (task._replace(shape=(24, 100)), "gemlite")):
        with pytest.raises(bench_rivals.Skipped):
            bench_rivals.ADAPTERS[name](wrong, x)
    monkeypatch.setattr(bench_gpu, "graph_seconds", lambda calls: 1e-6)
    monkeypatch.setattr(bench_gpu, "SPENT", {"conch": 2.0})
    times, errors = bench_gpu.beside(bench_gpu.Case("int4", (24, 256), 3), x, "cpu", 1.0)
    assert times["conch"] == "skipped: took its 1 s"
    assert times["gemlite"] == times["cublas"] == pytest.approx(1.0)
    assert set(errors) == {name for name, found in times.items() if isinstance(found, float)}
    assert set(bench_rivals.versions()) == set(bench_rivals.ADAPTERS) - {"cublas", "tinygemm"}
