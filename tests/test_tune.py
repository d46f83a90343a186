"""End-to-end tuning: its gradients are those of the divergence, and what it writes is what it found, or nothing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmquant import formats, pipeline, teacher, tune
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import MANIFEST, Checkpoint
from llmquant.output import OutputFolder
from llmquant.recipe import Recipe
from llmquant.tune import Matrix, Rates

WINDOWS = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(1))
HELD = torch.tensor([False] * 4 + [True] * 2)
FORMATS = (
    "int3:g32",
    "int4:g48:asym",
    "int3:g48:asym_float",
    "mxfp4",
    "nvfp4",
    "mx6",
    "nf4:g32",
    "vsq4:v16",
    "kmeans2:channel",
    "ternary:g32",
)


@dataclass
class Whole:
    """A model that is loaded as a whole, its matrices rounded to a format, and what leaves its last block."""

    folder: Path
    model: StreamedModel
    matrices: list[Matrix]
    wanted: Tensor

    def tune(self, **options: Any) -> tune.Tuned:
        vectors = dict.fromkeys(self.model.vectors(), torch.float32)
        taught = teacher.All(self.model, WINDOWS, list(self.wanted))
        return tune.tune(self.model, self.matrices, vectors, WINDOWS, taught, HELD, batch=2, **options)


@torch.no_grad()
def whole(folder: Path, spec: str) -> Whole:
    model = StreamedModel(Checkpoint(folder))
    model.load_outside()
    matrices = []
    for block in range(len(model.block_names)):
        model.load_block(block)
        for target in model.targets(block).values():
            fmt = formats.get(spec).stored_for(torch.float32)
            w = target.matrix(model.module(target)).float()
            matrices.append(Matrix(target, fmt, *fmt.quantize(w)))
    hidden, calls = model.embed(WINDOWS)
    for block, call in enumerate(calls):
        hidden = model.run_block(block, hidden, call)
    return Whole(folder, model, matrices, hidden)


def decoded_twin(given: Whole, matrices: list[Matrix], vectors: dict[str, Tensor] | None = None) -> nn.Module:
    """The model as transformers loads it, with these weights in place."""
    twin = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
    for matrix in matrices:
        decoded = matrix.format.decode(matrix.codes, matrix.grid)
        twin.get_parameter(matrix.target.name + ".weight").data = matrix.target.stored(decoded)
    for name, vector in (vectors or {}).items():
        twin.get_parameter(name).data = vector.float()
    return twin


def divergence(folder: Path, twin: nn.Module, windows: Tensor) -> Tensor:
    """Mean over tokens of KL(original || twin), by its definition."""
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p = original(windows).logits.double().softmax(-1)
    q = twin(windows).logits.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_the_divergence_in_weights_and_vectors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the chain rule from the gradient of plain models; GPT-2 stores its weights transposed, and has biases."""
    given = whole(make_checkpoint(tmp_path / "model", name, dtype=torch.float32), "int3:g48")
    seen: list[list[Tensor]] = []
    step = torch.optim.Adam.step

    def note(optimizer: torch.optim.Adam, *args: Any) -> Any:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", note)
    monkeypatch.setattr(tune, "batches", lambda indices, batch, steps, seed: [torch.tensor([0, 2])])
    given.tune(steps=1)
    twin = decoded_twin(given, given.matrices)
    divergence(given.folder, twin, WINDOWS[[0, 2]]).backward()
    count = len(given.matrices)
    shifts, stretches, deltas = seen[0][:count], seen[0][count : 2 * count], seen[0][2 * count :]
    for matrix, shift, stretch in zip(given.matrices, shifts, stretches, strict=True):
        gradient = twin.get_parameter(matrix.target.name + ".weight").grad
        assert isinstance(gradient, Tensor)
        gradient = gradient.T if matrix.target.transposed else gradient
        of_group = torch.arange(gradient.shape[1]) // matrix.grid.group
        torch.testing.assert_close(shift, gradient * matrix.grid.scale[:, of_group], rtol=1e-3, atol=1e-7)
        w = matrix.format.decode(matrix.codes, matrix.grid)
        expected = torch.zeros_like(stretch).index_add_(1, of_group, gradient * w)
        torch.testing.assert_close(stretch, expected, rtol=1e-3, atol=1e-7)
    assert deltas
    for vector, delta in zip(given.model.vectors(), deltas, strict=True):
        gradient = twin.get_parameter(vector).grad
        torch.testing.assert_close(delta, gradient, rtol=1e-3, atol=1e-7)


def test_blocks_run_again_give_the_same_and_codes_stay_without_shifts(tmp_path: Path) -> None:
    given = whole(make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32), "int2:g32")
    plain = given.tune(steps=4, rates=Rates(0.0, 1e-2, 1e-2))
    again = given.tune(steps=4, rates=Rates(0.0, 1e-2, 1e-2), recompute=True)
    assert plain.divergences == again.divergences
    assert plain.kept
    for found, begun in zip(plain.matrices, given.matrices, strict=True):
        assert torch.equal(found.codes, begun.codes)
        assert not found.grid.equals(begun.grid)


def test_what_is_reported_is_what_was_found_on_tokens_held_out(tmp_path: Path) -> None:
    given = whole(make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32), "int2:g32")
    tuned = given.tune(steps=30, rates=Rates(1e-2, 1e-2, 1e-2))
    before = divergence(given.folder, decoded_twin(given, given.matrices), WINDOWS[HELD])
    after = divergence(given.folder, decoded_twin(given, tuned.matrices, tuned.vectors), WINDOWS[HELD])
    assert tuned.divergences[0][1] == pytest.approx(before.item(), rel=1e-4)
    assert min(kl for _, kl in tuned.divergences) == pytest.approx(after.item(), rel=1e-4)
    assert tuned.kept
    assert after < before


def test_training_that_only_does_harm_leaves_everything_as_it_was(tmp_path: Path) -> None:
    given = whole(make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32), "int8:g32")
    tuned = given.tune(steps=5, rates=Rates(50.0, 5.0, 5.0))
    assert not tuned.kept
    for found, start in zip(tuned.matrices, given.matrices, strict=True):
        assert torch.equal(found.codes, start.codes)
        assert found.grid.equals(start.grid)
    parameters = dict(AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).named_parameters())
    for name, vector in tuned.vectors.items():
        assert torch.equal(vector, parameters[name])


@pytest.mark.parametrize("spec", FORMATS)
def test_every_kind_of_format_stays_within_what_its_file_can_hold(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter((3.0, 2.0))
    monkeypatch.setattr(teacher.Pupil, "divergence", lambda pupil, chosen: next(looks))  # whatever comes of it is kept
    given = whole(make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32), spec)
    start = [module.get_parameter("weight").clone() for module in _linears(given)]
    tuned = given.tune(steps=3, rates=Rates(5.0, 3.0, 0.01))
    pairs = list(zip(tuned.matrices, given.matrices, strict=True))
    assert all(not torch.equal(found.codes, begun.codes) for found, begun in pairs)
    if spec not in ("kmeans2:channel", "mx6"):  # no scale of theirs is free to move
        assert all(not found.grid.equals(begun.grid) for found, begun in pairs)
    for matrix in tuned.matrices:
        named = matrix.format.pack(matrix.codes, matrix.grid)
        codes, grid = matrix.format.unpack(named, matrix.target.shape)
        assert torch.equal(codes, matrix.codes)
        assert grid.equals(matrix.grid)
    for module, weight in zip(_linears(given), start, strict=True):  # the model is given back as it was lent
        assert type(module) is nn.Linear
        assert torch.equal(module.weight, weight)


def _linears(given: Whole) -> list[nn.Module]:
    return [given.model.module(matrix.target) for matrix in given.matrices]


# ---- in a run


def quantize(model: Path, output: Path, steps: int, samples: int = 32) -> dict[str, Any]:
    calibration = pipeline.Calibration("self", samples=samples, length=32, batch=8)
    job = pipeline.Job(str(model), Recipe.uniform("int2:g32"), calibration, tuning=steps)
    return pipeline.quantize(pipeline.prepare(job, output), output)


def test_the_folder_holds_what_tuning_found(tmp_path: Path) -> None:
    """Norms too, in their own type; the files that were tuned from are gone; every tensor is there once."""
    model = make_checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16, num_hidden_layers=2)
    manifest = quantize(model, tmp_path / "out", 40)
    plain = quantize(model, tmp_path / "plain", 0)
    assert manifest["tuning"]["kept"]
    assert "tuning" not in plain
    assert [tensor["name"] for tensor in manifest["tensors"]] == [tensor["name"] for tensor in plain["tensors"]]
    stored = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    names = [name for tensors in stored.values() for name in tensors]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(names) == sorted(index)
    assert {name: tensor.dtype for part in stored.values() for name, tensor in part.items()} == {
        name: tensor.dtype
        for path in (tmp_path / "plain").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(found.get_parameter(norm), stored[index[norm]][norm].float())
    assert not torch.equal(found.get_parameter(norm), Checkpoint(model).tensors([norm])[norm].float())
    windows = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(5))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        assert divergence(model, found, windows) < divergence(model, other, windows)
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, MANIFEST}


def test_a_run_cut_while_it_writes_what_was_tuned_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune.Tuned, "kept", True)
    model = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32, num_hidden_layers=2)
    quantize(model, tmp_path / "whole", 4, 8)
    write = OutputFolder.write_shard

    def cut(folder: OutputFolder, part: int, name: str, *args: Any) -> None:
        if name.startswith("tuned-00002"):
            raise KeyboardInterrupt
        write(folder, part, name, *args)

    monkeypatch.setattr(OutputFolder, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "cut", 4, 8)
    monkeypatch.setattr(OutputFolder, "write_shard", write)
    quantize(model, tmp_path / "cut", 4, 8)
    whole, cut_short = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "cut")
    )
    assert whole == cut_short
