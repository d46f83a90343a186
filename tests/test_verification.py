"""Verification: its figures are those of the whole models, and no damage that matters passes it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import make_checkpoint, make_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import cli, formats, inspection, metrics, pipeline, verification
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import MANIFEST, Checkpoint, sha256
from llmquant.errors import LlmquantError, VerificationError
from llmquant.formats.integer import Integer
from llmquant.recipe import Recipe


def quantize(model: Path, output: Path, spec: str, **options: object) -> dict:
    job = pipeline.Job(str(model), Recipe.uniform(spec), None)
    return pipeline.quantize(pipeline.prepare(job, output), output, **options)  # type: ignore[arg-type]


def verify(folder: Path, model: Path, windows: Tensor) -> verification.Verification:
    reference = StreamedModel(Checkpoint(model))
    return verification.verify(folder, reference, windows, manifest=inspection.manifest(folder))


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(5))


def relative(found: Tensor, wanted: Tensor) -> float:
    """The root of the mean square over tokens."""
    return float((((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)) ** 2).mean().sqrt())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_figures_are_those_of_the_whole_models(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", name, dtype=torch.float32, max_shard_size="100KB")
    manifest = quantize(model, tmp_path / "out", "int4:g48", verify=False)
    windows = tokens(3, 16)
    found = verify(tmp_path / "out", model, windows)
    assert not found.problems
    assert found.divergence is not None
    whole, loaded = AutoModelForCausalLM.from_pretrained(model), llmquant.load(tmp_path / "out")
    expected = metrics.divergence(whole, loaded, windows)
    assert found.divergence.mean == pytest.approx(expected.mean, rel=1e-3)
    assert found.divergence.reference.nll == pytest.approx(expected.reference.nll, rel=1e-5)
    with torch.no_grad():
        states = [m(windows, output_hidden_states=True).hidden_states for m in (whole, loaded)]
    for block in (0, 1):  # what transformers gives behind the last block has been normed
        drift = relative(states[1][block + 1], states[0][block + 1])
        assert found.blocks[block].drift == pytest.approx(drift, rel=1e-3)
    assert found.blocks[0].error == pytest.approx(found.blocks[0].drift, rel=1e-6)
    assert (found.blocks[1].error or 0) < (found.blocks[1].drift or 0)
    for part in found.blocks[:-1]:
        errors = [t["error"] for t in manifest["tensors"] if t["name"].startswith(f"{part.name}.")]
        mean_square = sum(error**2 for error in errors) / len(errors)
        assert part.matrices == len(errors)
        assert part.weights == pytest.approx(mean_square**0.5, rel=1e-3)


def test_a_model_without_blocks_that_run_is_compared_by_its_weights(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "bert")
    manifest = quantize(model, tmp_path / "out", "int4:channel")
    assert "is no causal language model" in manifest["verification"]["unchecked"]
    spoil(tmp_path / "out", lambda tensors: first_norm(tensors).add_(1))
    found = verify(tmp_path / "out", model, tokens(0, 0))
    assert len(found.problems) == 1
    assert "is not quantized, but differs" in found.problems[0]


def test_one_block_of_each_model_is_in_memory(quantized: Path, pycode: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, unload = StreamedModel.load_block, StreamedModel.unload_block
    loaded: dict[int, list[int]] = {}
    most: list[int] = []

    def loading(self: StreamedModel, block: int) -> torch.nn.Module:
        loaded.setdefault(id(self), []).append(block)
        most.append(sum(map(len, loaded.values())))
        return load(self, block)

    def unloading(self: StreamedModel, block: int) -> None:
        loaded[id(self)].remove(block)
        unload(self, block)

    monkeypatch.setattr(StreamedModel, "load_block", loading)
    monkeypatch.setattr(StreamedModel, "unload_block", unloading)
    assert not verify(quantized, pycode, tokens(2, 16)).problems
    assert len(most) == 2 * 6
    assert max(most) <= 2


# ---- damage that hashes do not show


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], object], shard: int = 0) -> None:
    """Change the shard of a block, by default of the first, and have the manifest agree."""
    _spoil(folder, change, sorted(folder.glob("model-0*"))[shard])


def _spoil(folder: Path, change: Callable[[dict[str, Tensor]], object], shard: Path) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, {"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][shard.name] = {"bytes": shard.stat().st_size, "sha256": sha256(shard)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert inspection.verify(folder) == []


def first_norm(tensors: dict[str, Tensor]) -> Tensor:
    return next(tensor for name, tensor in sorted(tensors.items()) if "orm" in name)


def mix_up(tensors: dict[str, Tensor]) -> None:
    """What one matrix holds under the name of another."""
    for suffix in ("weight_packed", "weight_scale"):
        gate, up = (f"model.layers.0.mlp.{part}_proj.{suffix}" for part in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def turn(tensors: dict[str, Tensor]) -> None:
    """A scale of the other sign."""
    tensors["model.layers.0.self_attn.o_proj.weight_scale"].neg_()


def shift(tensors: dict[str, Tensor]) -> None:
    """Every code one word too far."""
    packed = tensors["model.layers.0.mlp.down_proj.weight_packed"]
    packed.copy_(packed.roll(1, dims=1))


@pytest.fixture(scope="module")
def quantized(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    quantize(pycode, folder, "int4:g64")
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors: first_norm(tensors).mul_(1.01), "input_layernorm.weight: is not quantized, but differs"),
        (mix_up, r"gate_proj.weight: its error is 1\.3"),
        (turn, r"o_proj.weight: its error is 1\.9"),
        (shift, r"down_proj.weight: its error is 1\."),
    ],
)
def test_damage_that_hashes_do_not_show(
    damage: Callable[[dict[str, Tensor]], object], said: str, quantized: Path, pycode: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(quantized, folder)
    assert not verify(folder, pycode, tokens(2, 32)).problems
    spoil(folder, damage)
    found = verify(folder, pycode, tokens(2, 32))
    with pytest.raises(VerificationError, match=said):
        found.check(folder, "")


def test_another_model_of_the_same_shape_is_not_the_one_it_was_made_of(
    quantized: Path, pycode: Path, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(pycode)
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight.add_(0.02)
    other.save_pretrained(tmp_path / "other")
    problems = verify(quantized, tmp_path / "other", tokens(2, 32)).problems
    assert len(problems) == 1
    assert problems[0].startswith("model.layers.3.mlp.up_proj.weight: its error is")
    smaller = make_checkpoint(tmp_path / "smaller", "llama")
    with pytest.raises(LlmquantError, match=r"model\.layers\.3.*no such matrix"):
        verify(quantized, smaller, tokens(2, 32))


# ---- at the end of a run


def test_a_solver_that_went_wrong_leaves_no_folder(
    pycode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says itself how far off it is; nobody would have read it."""
    encode = Integer.encode
    monkeypatch.setattr(Integer, "encode", lambda self, w, grid: encode(self, w.roll(1, dims=1), grid))
    with pytest.raises(VerificationError, match=r"model\.layers\.\d: its outputs are off by .*--no-verify"):
        quantize(pycode, tmp_path / "out", "int4:g64")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(VerificationError):  # what was written is still the same
        quantize(pycode, tmp_path / "out", "int4:g64")
    assert "verification" not in quantize(pycode, tmp_path / "out", "int4:g64", verify=False)
    assert inspection.verify(tmp_path / "out") == []


@pytest.mark.parametrize("spec", ["binary:g64", "ternary:g64", "int2:g64", "nf4:g64", "fp8_e5m2:channel"])
def test_sound_runs_pass_in_every_format(spec: str, pycode: Path, tmp_path: Path) -> None:
    found = quantize(pycode, tmp_path / "out", spec)["verification"]
    assert found["worst_error"] < found["worst_bound"]
    assert found["tokens"] == verification.WINDOWS * verification.LENGTH


def test_command(
    quantized: Path, pycode: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmquant", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, said, _ = run(quantized, "--reference", pycode, "--json")
    facts = json.loads(said)
    assert (code, facts["problems"], len(facts["blocks"])) == (0, [], 7)
    assert 0 < facts["kl_mean"] < 0.2
    code, said, error = run(quantized, "--reference", pycode, "--max-kl", "0.001")
    assert code == 7
    assert "model.layers.5" in said  # the figures are printed all the same
    assert "the bound is 0.001" in error


def test_loading_hashes_on_request(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(quantized, folder)
    llmquant.load(folder, verify=True)
    shard = next(iter(sorted(folder.glob("model-0*"))))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    llmquant.load(folder)  # shapes, types and completeness are as they were
    with pytest.raises(VerificationError, match=f"{shard.name}: SHA-256 differs"):
        llmquant.load(folder, verify=True)


def test_what_is_decoded_is_what_the_format_says(quantized: Path, pycode: Path) -> None:
    decoded = verification.Decoded(quantized, StreamedModel(Checkpoint(pycode)))
    stored = load_file(sorted(quantized.glob("model-0*"))[2])
    fmt = formats.get("int4:g64:bf16")
    named = {suffix: stored[f"model.layers.2.mlp.up_proj.{suffix}"] for suffix in fmt.layout((384, 128))}
    shape = tuple(named["weight_shape"].tolist())
    expected = fmt.decode(*fmt.unpack(named, shape))
    assert torch.equal(decoded.tensor("model.layers.2.mlp.up_proj.weight"), expected)
