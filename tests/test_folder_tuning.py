"""Tuning a finished folder: what it trains, what it leaves, and that half of a run is as good as a whole one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant
from llmquant import errors, folder_tuning, teacher
from llmquant.blocks import StreamedModel
from llmquant.calibration import Streams
from llmquant.checkpoint import MANIFEST, Checkpoint
from llmquant.job import Calibration
from llmquant.output import OutputFolder
from llmquant.teacher import All, Likeliest

WINDOWS = torch.randint(3, 300, (16, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_file({"tokens": WINDOWS}, tmp_path / "tokens.safetensors")
    return make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32, num_hidden_layers=2)


def folder_of(model: Path, spec: str) -> Path:
    output = model.parent / spec.replace(":", "-")
    llmquant.quantize(model, output, format=spec, quality="fast", verify=False, report=False)
    return output


def tune(folder: Path, model: Path, output: Path, steps: int = 12, **options: Any) -> dict[str, Any]:
    calibration = Calibration(str(model.parent / "tokens.safetensors"), samples=16, batch=4, curvature=0.0)
    prepared, course = folder_tuning.prepare(folder, str(model), calibration, output, steps=steps, **options)
    return folder_tuning.tune_folder(folder, prepared, course, output)


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def divergence(model: Path, folder: Path, windows: Tensor) -> float:
    """Mean over tokens of KL(original || folder's model), by its definition."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(windows).logits.double().softmax(-1)
            for path in (model, folder)
        )
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("spec", ["int2:g32", "int3:g32:asym", "int2:g32:asym_float"])
def test_codes_stay_and_the_divergence_noted_is_the_folders_own(spec: str, model: Path, tmp_path: Path) -> None:
    folder = folder_of(model, spec)
    facts = tune(folder, model, tmp_path / "out", steps=26)
    assert facts["tuning"]["kept"]
    least = min(kl for _, kl in facts["tuning"]["divergences"])
    assert divergence(model, folder, WINDOWS[14:]) == pytest.approx(facts["tuning"]["divergences"][0][1], rel=1e-3)
    assert divergence(model, tmp_path / "out", WINDOWS[14:]) == pytest.approx(least, rel=1e-3)
    before, after = stored(folder), stored(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"weight_scale", "weight", *(["weight_zero_point"] if spec.endswith("float") else [])}
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, MANIFEST}


def test_what_is_no_better_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter((1.0, 2.0))
    monkeypatch.setattr(teacher.Pupil, "divergence", lambda pupil, chosen: next(looks))
    folder = folder_of(model, "int4:g32")
    facts = tune(folder, model, tmp_path / "out", steps=3)
    assert not facts["tuning"]["kept"]
    before, after = stored(folder), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("top", [0, 5])
def test_a_run_that_was_cut_ends_as_if_it_had_not_been(
    top: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(model, "int2:g32")
    tune(folder, model, tmp_path / "whole", steps=30, top=top)
    keep = OutputFolder.keep_state

    def cut(written: OutputFolder, step: int, tensors: dict[str, Tensor]) -> None:
        keep(written, step, tensors)
        if step:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFolder, "keep_state", cut)
    with pytest.raises(KeyboardInterrupt):
        tune(folder, model, tmp_path / "cut", steps=30, top=top)
    monkeypatch.setattr(OutputFolder, "keep_state", keep)
    tune(folder, model, tmp_path / "cut", steps=30, top=top)
    whole, taken_up = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "cut")
    )
    assert whole == taken_up


def test_likeliest_tokens_and_the_rest_are_a_distribution_of_their_own(model: Path) -> None:
    """Against the definition; never more than over all tokens, and the same when all are kept."""
    streamed = StreamedModel(Checkpoint(model))
    with torch.no_grad():
        hidden = teacher.last_states(Streams.start(streamed, WINDOWS, 4, lambda done, total: None), lambda *_: None)
        streamed.load_outside()
        kept = {count: Likeliest(**teacher.likeliest(streamed, WINDOWS, hidden, count)) for count in (5, 300)}
        logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(3))
        wanted = streamed.logits(WINDOWS[2:3], hidden[2][None])[0].double().softmax(-1)
        q = logits.double().softmax(-1)
        whole = float((wanted * (wanted / q).log()).sum())
        exact = All(streamed, WINDOWS, hidden).divergence(2, slice(0, 16), logits)
        assert float(exact) == pytest.approx(whole, rel=1e-4)
        assert float(kept[300].divergence(2, slice(0, 16), logits)) == pytest.approx(whole, rel=1e-3)
        expected = 0.0
        for p_row, q_row in zip(wanted, q, strict=True):
            best = p_row.argsort(descending=True)[:5]
            outcomes = [(float(p_row[i]), float(q_row[i])) for i in best]
            outcomes.append((1 - sum(p for p, _ in outcomes), 1 - sum(q for _, q in outcomes)))
            expected += sum(p * float(torch.tensor(p / q).log()) for p, q in outcomes)
        found = float(kept[5].divergence(2, slice(0, 16), logits))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found < whole


def test_what_cannot_be_tuned_is_refused(model: Path, tmp_path: Path) -> None:
    folder = folder_of(model, "int4:g32")
    with pytest.raises(errors.PlanError, match="bytes of memory"):
        tune(folder, model, tmp_path / "out", max_memory=2**20)
    with pytest.raises(errors.PlanError, match="at least 1 step"):
        tune(folder, model, tmp_path / "out", steps=0)
    shard = next(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\1"[-1:])
    with pytest.raises(errors.VerificationError, match="SHA-256"):
        tune(folder, model, tmp_path / "out")
