"""Training while rounded: gradients are LSQ's, what is written is what was trained, and a cut run changes nothing."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import save_file
from torch import Tensor

import llmquant
from llmquant import errors, formats, qat
from llmquant.fake_quantize import FakeQuantized
from llmquant.job import Calibration, Job
from llmquant.matrices import Target
from llmquant.output import OutputFolder
from llmquant.qat import Course
from llmquant.recipe import Recipe

SHAPE = (3, 10)  # the last group of four is short


def part(spec: str, rounding: str = "nearest") -> tuple[FakeQuantized, Tensor]:
    """A fake quantizer, and a weight of which some lies beyond the levels."""
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    fmt = formats.get(spec).stored_for(torch.float32)
    grid = fmt.fit(0.6 * w)
    return FakeQuantized(Target("w", SHAPE, False, False), fmt, grid, torch.float32, rounding), w


@pytest.mark.parametrize("spec", ["int2:g4", "int3:g4:asym", "int2:g4:asym_float", "ternary:g4", "binary:channel"])
def test_gradients_are_those_of_learned_step_sizes(spec: str) -> None:
    """Element by element, by equations 2, 3 and 5 of LSQ, and for zero points by section 3.1 of LSQ+."""
    fake, w = part(spec)
    weight = w.clone().requires_grad_()
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    (fake.value(weight) * gradient).sum().backward()
    lattice, group = fake.format.lattice(fake.start), fake.start.group
    levels = lattice.levels[0].tolist()
    of_weight, of_stretch, of_drift = (
        torch.zeros(SHAPE),
        torch.zeros_like(lattice.scale),
        torch.zeros_like(lattice.scale),
    )
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            place = row, column // group
            s = float(lattice.scale[place])
            z = 0.0 if lattice.zero is None else float(lattice.zero[place])
            o = 0.0 if lattice.offset is None else float(lattice.offset[place])
            g, v = float(gradient[row, column]), (float(w[row, column]) - o) / s + z
            low, high = levels[0], levels[-1]
            if low <= v <= high:
                of_weight[row, column] = g
                of_stretch[place] += g * (min(levels, key=lambda level: abs(level - v)) - v) * s
            else:
                end = low if v < low else high
                of_stretch[place] += g * (end - z) * s
                of_drift[place] += g * (abs(s) if lattice.offset is not None else -s)
    share = 1 / math.sqrt(min(group, SHAPE[1]) * max(map(abs, levels)))
    assert weight.grad is not None
    assert (of_weight == 0).any()
    torch.testing.assert_close(weight.grad, of_weight)
    torch.testing.assert_close(fake.stretch.grad, of_stretch * share, rtol=1e-4, atol=1e-6)
    if fake.drift is None:
        assert "asym" not in spec
    else:
        torch.testing.assert_close(fake.drift.grad, of_drift * share, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["int3:g4", "int3:g4:asym", "nf4:g4", "binary:g4"])
def test_rounding_is_the_formats_own_or_by_chance_or_down(spec: str) -> None:
    fake, w = part(spec)
    lattice = fake.format.lattice(fake.start)
    found = fake.value(w)
    assert torch.equal(found, fake.format.decode(fake.format.encode(w, fake.start), fake.start))
    all_values = torch.stack(
        [fake.format.decode(lattice.codes[torch.full(SHAPE, k)], fake.start) for k in range(len(lattice.codes))]
    )
    inside = (w > all_values.amin(0)) & (w < all_values.amax(0))
    fake.rounding = "floor"
    steps = torch.where(lattice.scale < 0, -1.0, 1.0).repeat_interleave(4, 1)[:, :10]  # down in units of the scale
    below = torch.where(all_values * steps <= w * steps, all_values * steps, -torch.inf).amax(0) * steps
    assert torch.equal(fake.value(w)[inside], below[inside])
    fake.rounding = "stochastic"
    torch.manual_seed(0)
    draws = torch.stack([fake.value(w) for _ in range(800)])
    spread = all_values.amax(0) - all_values.amin(0)
    assert ((draws.mean(0) - w).abs()[inside] < 0.07 * spread[inside]).all()
    assert all(len(draws[:, r, c].unique()) <= 2 for r in range(SHAPE[0]) for c in range(SHAPE[1]))


# ---- in a run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32)


def prepared(model: Path, output: Path, spec: str, course: Course, **options: Any) -> Any:
    tokens = model.parent / "tokens.safetensors"
    if not tokens.exists():
        generator = torch.Generator().manual_seed(1)
        save_file({"tokens": torch.randint(3, 300, (16, 16), generator=generator)}, tokens)
    calibration = Calibration(str(tokens), samples=16, batch=4, curvature=0.0)
    job = Job(str(model), Recipe.uniform(spec, solver="rtn"), calibration, seed=1)
    return qat.prepare(job, course, output, **options)


def train(model: Path, output: Path, spec: str, course: Course) -> dict[str, Any]:
    return qat.train(prepared(model, output, spec, course), course, output)


@pytest.mark.parametrize("spec", ["int2:g32", "ternary:g32:twn", "int3:g48:asym"])
def test_the_folder_predicts_what_the_trained_model_did(
    spec: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    check = qat._check_same

    def note(folder: Path, given: Any, shown: Tensor, expected: Tensor) -> None:
        seen.extend((shown, expected))
        check(folder, given, shown, expected)

    monkeypatch.setattr(qat, "_check_same", note)
    facts = train(model, tmp_path / "out", spec, Course(steps=12, batch=4, looks=6, rate=0.01, other_rate=0.01))
    first, *later = facts["qat"]["divergences"]
    assert min(kl for _, kl in later) < first[1]
    loaded = llmquant.load(tmp_path / "out", dtype=torch.float32, verify=True)
    shown, expected = seen
    with torch.no_grad():
        torch.testing.assert_close(loaded(shown).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_other_predictions_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = qat._write

    def spoil(given: Any, folder: OutputFolder, weights: dict[str, FakeQuantized], moved: Any) -> None:
        next(iter(weights.values())).shift.add_(3.0)
        write(given, folder, weights, moved)

    monkeypatch.setattr(qat, "_write", spoil)
    with pytest.raises(errors.VerificationError, match="differ from those of the trained model"):
        train(model, tmp_path / "out", "int2:g32", Course(steps=1, batch=2))
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_cut_ends_as_if_it_had_not_been(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = Course(steps=9, batch=4, looks=3, rate=0.05, rounding="stochastic", cross_entropy=0.3)
    train(model, tmp_path / "whole", "int2:g32", course)
    keep = OutputFolder.keep_state

    def cut(folder: OutputFolder, step: int, tensors: dict[str, Tensor]) -> None:
        if step == 6:
            raise KeyboardInterrupt
        keep(folder, step, tensors)

    monkeypatch.setattr(OutputFolder, "keep_state", cut)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "cut", "int2:g32", course)
    monkeypatch.setattr(OutputFolder, "keep_state", keep)
    train(model, tmp_path / "cut", "int2:g32", course)
    whole, taken_up = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "cut")
    )
    assert whole == taken_up


def test_pieces_of_a_batch_give_its_gradient(model: Path, tmp_path: Path) -> None:
    found = [
        train(model, tmp_path / f"out{pieces}", "int3:g32", Course(steps=4, batch=4, accumulate=pieces, looks=2))
        for pieces in (1, 4)
    ]
    for one, other in zip(*(facts["qat"]["divergences"] for facts in found), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-3)


def test_what_cannot_be_trained_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    for course, words in (
        (Course(batch=8, accumulate=3), "equal pieces"),
        (Course(rounding="up"), "nearest, stochastic, floor"),
        (Course(steps=0), "at least 1"),
    ):
        with pytest.raises(errors.PlanError, match=words):
            prepared(model, tmp_path / "out", "int2:g32", course)
    with pytest.raises(errors.PlanError, match="bytes of memory"):
        prepared(model, tmp_path / "out", "int2:g32", Course(), max_memory=2**20)
