"""Scales moved between parts of a block: outliers that a norm hides cost nothing, and AWQ is what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import outliers
import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file
from test_pipeline import SMALL, contents, dense_twin, quantize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmquant import formats, inspection, metrics, pipeline, scaling, text
from llmquant.output import OutputFolder
from llmquant.recipe import Recipe, Rule
from llmquant.shown import asked_windows
from llmquant.stats import Stats


@pytest.mark.parametrize("spec", ["int4:g32", "int3:g32"])
def test_outliers_that_weights_undo_change_the_divergence_by_a_tenth_at_most(
    spec: str, pycode: Path, held_out: Path, tmp_path: Path
) -> None:
    documents = json.loads(held_out.read_text())
    known, other = tmp_path / "known.json", documents[len(documents) // 2 :]
    known.write_text(json.dumps(documents[: len(documents) // 2]))
    calibration = pipeline.Calibration(str(known), samples=16, length=128, curvature=False)
    windows = text.windows(text.token_stream(text.load_tokenizer(pycode), other, protocol="documents"), 256)[:16]
    reference = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    found = []
    for factor in (1.0, 30.0):
        planted = outliers.hidden_by_norms(outliers.loaded(pycode), factor)
        model = outliers.saved(planted, pycode, tmp_path / f"model{factor}")
        manifest = quantize(model, tmp_path / f"out{factor}", spec, calibration=calibration)
        balanced = [note for note in manifest["scaled"] if note["rule"] == "balance"]
        assert len(balanced) == 0 if factor == 1 else len(balanced) > 8  # of twelve norms
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{factor}")
        found.append(metrics.divergence(reference, loaded, windows).mean)
    assert found[1] < 1.1 * found[0]


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "opt"])
def test_awq_is_loaded_as_it_was_decoded(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", name)
    manifest = quantize(model, tmp_path / "out", Recipe((Rule("*", "int3:g16", "awq"),)), calibration=SMALL)
    rules = {note["source"].rpartition(".")[2]: note["alpha"] for note in manifest["scaled"]}
    assert len(rules) >= 3
    assert all(0 < alpha < 1 for alpha in rules.values())
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense_twin(model, tmp_path / "out")(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert inspection.verify(tmp_path / "out") == []


def test_awq_takes_the_power_of_least_error(tmp_path: Path) -> None:
    """The first place of the first block, by hand: the search over the module that holds the readers."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    manifest = quantize(folder, tmp_path / "out", Recipe((Rule("*", "int3:g16", "awq"),)), calibration=SMALL)
    note = next(note for note in manifest["scaled"] if note["source"] == "model.layers.0.input_layernorm")
    stored = load_file(tmp_path / "out" / "model-00001-of-00004.safetensors")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    job = pipeline.Job(str(folder), Recipe.uniform("int3:g16"), SMALL)
    prepared = pipeline.prepare(job, tmp_path / "unused")
    windows = asked_windows(prepared, SMALL, pipeline.silent)[:3]  # the last of four is held out
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    linears: list[nn.Linear] = [attention.q_proj, attention.k_proj, attention.v_proj]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = [
        linears[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        attention.register_forward_hook(lambda module, args, output: outputs.append(output[0])),
    ]
    fmt = formats.get("int3:g16")
    errors, scales = [], []
    originals = [linear.weight.data for linear in linears]
    with torch.no_grad():
        model(windows)
        wanted, size = outputs[0], inputs[0].abs().mean((0, 1))
        for power in range(20):
            scale = size ** (power / 20)
            scales.append(scale / (scale.max() * scale.min()).sqrt())
            for linear, weight in zip(linears, originals, strict=True):
                scaled = weight * scales[-1]
                linear.weight.data = fmt.decode(*fmt.quantize(scaled, clip="minmax")) / scales[-1]
            model(windows)
            errors.append(float((outputs[-1] - wanted).square().sum()))
    for handle in handles:
        handle.remove()
    best = min(range(20), key=errors.__getitem__)
    assert note["alpha"] == best / 20
    assert note["error"] == pytest.approx((errors[best] / errors[0]) ** 0.5, rel=1e-3)
    found = stored["model.layers.0.input_layernorm.weight"]
    torch.testing.assert_close(found, norm.weight.data / scales[best], rtol=1e-4, atol=1e-6)


def test_a_run_cut_after_a_scaled_block_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    recipe = Recipe((Rule("*", "int3:g16", "awq"),))
    quantize(model, tmp_path / "whole", recipe, calibration=SMALL)
    write = OutputFolder.write_shard

    def cut(self: OutputFolder, part: int, *args: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write(self, part, *args)

    monkeypatch.setattr(OutputFolder, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "cut", recipe, calibration=SMALL)
    monkeypatch.undo()
    quantize(model, tmp_path / "cut", recipe, calibration=SMALL)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("known", [True, False])
def test_statistics_of_scaled_inputs(known: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, x_ref, lacking = (torch.randn(30, 6, generator=generator) for _ in range(3))
    scale = torch.rand(6, generator=generator) + 0.5
    stats, expected = Stats.empty(6), Stats.empty(6)
    for found, by in ((stats, torch.ones(6)), (expected, scale)):
        found.update(x / by, x_ref / by, lacking if known else None)
        found.hold(x[:5] / by, x_ref[:5] / by, lacking[:5] if known else None)
    scaled = stats.scaled(scale)
    for name in ("hessian", "lacking" if known else "cross"):
        torch.testing.assert_close(getattr(scaled, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    w = torch.randn(6, 6, generator=generator)
    torch.testing.assert_close(scaled.wanted(w), expected.wanted(w), rtol=1e-4, atol=1e-4)
    assert scaled.held is not None
    assert expected.held is not None
    torch.testing.assert_close(scaled.held.x_ref, expected.held.x_ref)
    assert scaled.tokens == 30


def test_the_curvature_of_scaled_rows() -> None:
    """y' = s y has the gradients g / s; the last block is padded."""
    gradients = torch.randn(50, 6, generator=torch.Generator().manual_seed(5))
    scale = torch.tensor([1.0, 2.0, 0.5, 4.0, 3.0, 0.1])
    scales = object.__new__(scaling.Scales)
    scales.rows = {"v": scale}

    def blocks(g: Tensor) -> Tensor:
        parts = nn.functional.pad(g, (0, 2)).unflatten(1, (2, 4)).transpose(0, 1)
        return parts.mT @ parts

    found = scales.curvature("v", blocks(gradients))
    assert found is not None
    torch.testing.assert_close(found, blocks(gradients / scale), rtol=1e-4, atol=1e-4)


def test_tuning_begins_where_scales_were_moved(tmp_path: Path) -> None:
    """Norms as they were before would be off by the scales: then the first divergence is nothing like that without."""
    model = make_checkpoint(tmp_path / "model", "llama")
    first = []
    for solver in ("rtn", "awq"):
        recipe = Recipe((Rule("*", "int4:g16", solver),))
        manifest = quantize(model, tmp_path / solver, recipe, calibration=SMALL, tuning=1)
        first.append(manifest["tuning"]["divergences"][0][1])
        assert bool(manifest["scaled"]) == (solver == "awq")
    assert first[1] < 1.5 * first[0]
