"""Rotations: orthogonal, exact on models that allow them, refused with a reason on those that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import outliers
import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file
from test_pipeline import SMALL, quantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmquant import card, formats, metrics, pipeline, rotation, trial, verification
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import MANIFEST, Checkpoint
from llmquant.errors import PlanError
from llmquant.plan import Plan, make_plan
from llmquant.recipe import Recipe
from llmquant.rotation import RotatedCheckpoint, Rotation

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def rotate(folder: Path, mode: str, seed: int = 0) -> RotatedCheckpoint:
    checkpoint = Checkpoint(folder)
    model = StreamedModel(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return rotation.rotated(checkpoint, model, mode, seed, lambda done, total: None)


def whole(checkpoint: Checkpoint) -> PreTrainedModel:
    """A model with the checkpoint's tensors and config."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    config.tie_word_embeddings = checkpoint.config().get("tie_word_embeddings", config.tie_word_embeddings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(checkpoint.tensors(checkpoint.names()), strict=False)
    assert not unexpected
    assert set(missing) <= set(model.all_tied_weights_keys)
    return model


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 96, 172])
def test_a_rotation_is_orthogonal_and_depends_on_its_seed(size: int) -> None:
    matrix = Rotation(size, 5)(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    x = torch.randn(4, 2 * size, generator=torch.Generator().manual_seed(0))
    both = torch.cat([x[:, :size] @ matrix, x[:, size:] @ matrix], 1)
    torch.testing.assert_close(Rotation(size, 5)(x), both, rtol=1e-5, atol=1e-5)
    if size > 3:
        assert not torch.equal(Rotation(size, 6)(torch.eye(size)), matrix)


def test_a_rotation_spreads_what_stands_out() -> None:
    for size in (64, 96, 448):
        spread = Rotation(size, 0)(torch.eye(size)).abs()
        assert spread.max() < 3 * size**-0.5


@pytest.mark.parametrize("mode", ["value", "residual"])
@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True), ("mistral", False), ("gemma", True)],
)
def test_the_rotated_model_has_the_logits_of_the_original(name: str, tied: bool, mode: str, tmp_path: Path) -> None:
    """Grouped queries, biases, a sliding window, and a norm that adds one to its weight."""
    folder = make_checkpoint(tmp_path, name, tied=tied)
    found = rotate(folder, mode)
    assert found.untied == (tied and mode == "residual")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        logits = whole(found)(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    changed = [key for key in found.edits if not torch.equal(*(c.tensors([key])[key] for c in (found, _copy(found))))]
    assert len(changed) == len(found.edits)  # all of them really are others


def _copy(found: RotatedCheckpoint) -> RotatedCheckpoint:
    """The original, with a head of its own where the rotated one has it."""
    return RotatedCheckpoint(Checkpoint(found.folder), {}, found.copies)


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_other_models_that_allow_it(name: str, tmp_path: Path) -> None:
    """Norms within a head, and matrices that are several in one."""
    folder = make_checkpoint(tmp_path, name)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        logits = whole(rotate(folder, "residual"))(IDS).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("gpt2", "residual", r"ln_1 subtracts a mean"),
        ("gemma2", "residual", r"post_attention_layernorm cannot be moved into what reads it"),
        ("olmo2", "residual", r"post_attention_layernorm|q_norm"),
        ("mixtral", "residual", r"post_attention_layernorm cannot be moved"),
        ("phi3", "value", r"no linear that makes the values of heads"),
    ],
)
def test_models_that_do_not_allow_it_are_refused_with_a_reason(
    name: str, mode: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=reason):
        rotate(make_checkpoint(tmp_path, name), mode)


def test_a_rotated_tied_model_is_quantized_streamed_and_loaded(tmp_path: Path) -> None:
    """Int8 leaves little to see: the loaded model is nearly the original, and exactly what the files decode to."""
    folder = make_checkpoint(tmp_path / "model", "llama", tied=True, max_shard_size="100KB")
    out = tmp_path / "out"
    manifest = quantize(folder, out, "int8:g32", calibration=SMALL, rotate="residual")
    assert manifest["settings"]["rotate"] == "residual"
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        logits = loaded(IDS).logits
    assert (logits - expected).norm() < 0.03 * expected.norm()

    stored = {name: value for shard in out.glob("*.safetensors") for name, value in load_file(shard).items()}
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: stored[name] for name in twin.state_dict() if name in stored}
    for tensor in json.loads((out / MANIFEST).read_text())["tensors"]:
        fmt, base = formats.get(tensor["format"]), tensor["key"].removesuffix("weight")
        named = {suffix: stored[base + suffix] for suffix in fmt.layout(tensor["shape"])}
        state[tensor["key"]] = fmt.decode(*fmt.unpack(named, tensor["shape"]))
    twin.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(logits, twin(IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_plan_says_what_untying_costs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", tied=True)

    def plan(mode: str) -> Plan:
        job = pipeline.Job(str(folder), Recipe.uniform("int4:g32"), None, rotate=mode)
        return pipeline.prepare(job, tmp_path / "out").plan

    rotated, plain = plan("residual"), plan("value")
    assert rotated.bytes_after - plain.bytes_after == 300 * 64 * 4
    assert "76,800 bytes" in rotated.notes[0]
    assert not plain.notes
    with pytest.raises(PlanError, match="rotation 'twice' is unknown"):
        plan("twice")


# ---- which one


@pytest.fixture(scope="module")
def hidden(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with outliers that a norm hides."""
    planted = outliers.hidden_by_norms(outliers.loaded(pycode), 30.0)
    folder: Path = outliers.saved(planted, pycode, tmp_path_factory.mktemp("hidden") / "model")
    return folder


def test_a_trial_is_the_divergence_of_the_run_that_it_stands_for(pycode: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(pycode)
    model = StreamedModel(checkpoint, dtype=torch.float32)
    windows = verification.random_windows(model, 4, 32)
    rows = make_plan(checkpoint, model, Recipe.uniform("int3:g32"), tmp_path / "out").rows
    quantize(pycode, tmp_path / "out", "int3:g32")
    reference, loaded = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (pycode, tmp_path / "out")
    )
    expected = metrics.divergence(reference, loaded, windows).mean
    assert trial.divergence(model, rows, windows, 4) == pytest.approx(expected, rel=1e-3)


def test_a_rotation_is_chosen_where_weights_hide_outliers(pycode: Path, hidden: Path, tmp_path: Path) -> None:
    def chosen(model: Path, **settings: Any) -> pipeline.Prepared:
        job = pipeline.Job(
            str(model), Recipe.uniform("int4:g32"), **{"calibration": None, "rotate": "auto", **settings}
        )
        return pipeline.prepare(job, tmp_path / "out")

    plain, loud, balanced = chosen(pycode), chosen(hidden), chosen(hidden, calibration=SMALL)
    assert [one.job.rotate for one in (plain, loud, balanced)] == ["none", "residual", "none"]
    assert loud.rotation is not None
    found = loud.rotation["divergences"]
    assert list(found) == list(rotation.MODES)
    assert found["residual"] < 0.3 * found["none"]
    assert f"residual {found['residual']:.4f}" in loud.plan.notes[-1]
    assert balanced.rotation is not None
    assert "scales are moved instead" in balanced.rotation["reason"]


def test_what_is_chosen_is_noted_and_what_cannot_be_is_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "gpt2")
    manifest = quantize(folder, tmp_path / "out", "int4:g16", rotate="auto")
    assert manifest["settings"]["rotate"] == manifest["rotation"]["chosen"] == "none"
    assert "ln_1 subtracts a mean" in manifest["rotation"]["refused"]["residual"]
    assert "residual cannot be: " in card.text(manifest)
    assert "--rotate" not in card.command(manifest)
    assert trial.decide({"none": 1.0, "value": 0.9, "residual": 0.7})["chosen"] == "residual"
    assert trial.decide({"none": 1.0, "value": 0.9, "residual": 1.1})["chosen"] == "none"
