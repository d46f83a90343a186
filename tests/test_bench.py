"""What `llmquant bench` measures, and what `inspect` and `explain` say of kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmquant
from llmquant import benchmark, cli, formats, inspection
from llmquant.errors import PlanError
from llmquant_kernels import decode
from llmquant_kernels.measure import copy_bandwidth, timed


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.app(list(words), standalone_mode=False)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    rules = (llmquant.Rule("*.down_proj", "nvfp4"), llmquant.Rule("*", "int4:g128"))
    llmquant.quantize(pycode, out, format=llmquant.Recipe(rules), quality="fast", verify=False, report=False)
    return out


@pytest.mark.parametrize("spec", ["int3:g32", "nvfp4", "kmeans2:channel", "fp8_e4m3:block", "ternary:g128"])
def test_random_weights_repeat_quantized_rows(spec: str) -> None:
    fmt = formats.get(spec).stored_for(torch.bfloat16)
    weight = benchmark.of_shape(spec, (200, 256), torch.bfloat16)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16
    expected = fmt.decode(*fmt.quantize(w))
    assert torch.equal(decode(weight, torch.float32), expected.repeat(4, 1)[:200])


def test_a_clock_that_is_known_gives_the_figures() -> None:
    """Every look at the clock is a millisecond after the last: dense and quantized take as long, one each."""
    now = iter(range(10**6))
    weight = benchmark.of_shape("int4:g32", (64, 128), torch.bfloat16)
    found = list(
        benchmark.lines(
            "w", "int4:g32", weight, [2], dtype=torch.bfloat16, device="cpu", bandwidth=1e6,
            clock=lambda: next(now) / 1e3,
        )
    )  # fmt: skip
    assert [line.milliseconds for line in found] == [pytest.approx(1)]
    assert [line.dense_milliseconds for line in found] == [pytest.approx(1)]
    assert found[0].speedup == pytest.approx(1)
    assert found[0].nbytes == weight.nbytes + 2 * 2 * (64 + 128)
    assert found[0].share == pytest.approx(found[0].nbytes / 1e-3 / 1e6)
    assert found[0].error < 2 * found[0].dense_error
    assert copy_bandwidth("cpu", lambda: next(now) / 1e3) == pytest.approx(2 * 2**27 * 1e3)
    assert timed(lambda: weight.scale, lambda: next(now)) == 1


def test_bench_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "64", "128", "--format", "mxfp4", "--format", "int4:g128", "--rows", "1,3", "--runs", "1"]
    printed = run(capsys, "bench", *words)
    for words_of_line in (("64x128", "mxfp4", "1", "cpu_compiled"), ("64x128", "int4:g128", "3", "cpu_compiled")):
        assert any(set(words_of_line) <= set(line.split()) for line in printed.splitlines()), printed
    assert "copies at" in printed


def test_bench_of_a_folder_has_the_matrices_of_one_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "bench", str(folder), "--rows", "2", "--runs", "1", "--cpu-time", "--json"))
    listed = [tensor for tensor in inspection.manifest(folder)["tensors"] if ".layers.0." in tensor["name"]]
    assert [(line["name"], line["format"], line["shape"]) for line in found["lines"]] == [
        (tensor["name"], tensor["format"], tensor["shape"]) for tensor in listed
    ]
    assert found["threads"] == 1
    assert all(line["error"] < 3 * line["dense_error"] for line in found["lines"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tune"], "needs an NVIDIA GPU"),
        (["--rows", "1,none"], "give numbers of rows, as 1,8,32"),
        (["--rows", "0"], "give numbers of rows"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--format", "int4:g128", "--cpu-time", "--device", "cuda"], "it counts the time of a CPU's thread"),
        (["--format", "int9"], "int9"),
    ],
)
def test_bench_refuses(words: list[str], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        cli.app(["bench", *words], standalone_mode=False)


def test_inspect_names_the_kernel_of_every_matrix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "inspect", str(folder))
    assert "not triton: runs on GPUs only" in printed.replace("\n", " ")
    found = json.loads(run(capsys, "inspect", str(folder), "--json"))["kernels"]
    for name in ("down", "up"):
        own = found[f"model.layers.0.mlp.{name}_proj"]
        assert own == {"kernel": "cpu_compiled", "refused": {"triton": "runs on GPUs only, the weight is on cpu"}}
    facts = inspection.manifest(folder)
    assert inspection.kernels(folder, facts, "cuda")["model.layers.0.mlp.up_proj"][0] == "triton"
    assert inspection.kernels(folder, facts, "mps")["model.layers.0.mlp.up_proj"][0] == "reference"


def test_decoded_weights_are_kept_where_asked(folder: Path) -> None:
    model: Any = llmquant.load(folder, keep_decoded=True, dtype=torch.float32)
    plain: Any = llmquant.load(folder, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj"
    said, before = (llmquant.explain(own)[name] for own in (model, plain))
    assert said == before + "\nkeep_decoded: many rows by the decoded weight, which takes 0.2 MiB more"
    tokens = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
    layer = model.get_submodule(name)
    assert torch.equal(layer._prepared[torch.float32].decoded, layer.dequantize())
    assert plain.get_submodule(name)._prepared[torch.float32].decoded is None
