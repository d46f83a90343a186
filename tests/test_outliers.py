"""What large models have, massive activations and blocks that hardly do anything: they quantize and verify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import outliers
import pytest
import torch
from safetensors.torch import save_file
from test_pipeline import quantize
from test_verification import spoil, verify
from torch import Tensor

import llmquant
from llmquant import formats, metrics, text
from llmquant.calibration import quieted
from llmquant.checkpoint import MANIFEST
from llmquant.formats import Format
from llmquant.pipeline import Calibration
from llmquant.solvers import algebra, gptq, refit
from llmquant.stats import Stats

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def windows(pycode: Path, held_out: Path) -> Tensor:
    """Text of which each window begins with BOS, (windows, 64)."""
    documents = json.loads(held_out.read_text())
    found = text.windows(text.token_stream(text.load_tokenizer(pycode), documents, protocol="documents"), 64)
    found = found[:: len(found) // 48][:48].clone()
    found[:, 0] = 0
    return found


@pytest.fixture(scope="module")
def calibration(windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    save_file({"tokens": windows[:16].contiguous()}, path)
    return Calibration(str(path), samples=16, length=64, curvature=0.0, check=False)


@pytest.fixture(scope="module")
def massive(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("massive") / "model"
    return outliers.saved(outliers.massive(outliers.loaded(pycode)), pycode, folder)


def test_the_model_with_massive_activations_computes_the_same(pycode: Path, massive: Path, windows: Tensor) -> None:
    plain, planted = outliers.loaded(pycode), outliers.loaded(massive)
    assert metrics.divergence(plain, planted, windows[:4]).mean < 1e-5
    with torch.no_grad():
        states = planted(windows[:2], output_hidden_states=True).hidden_states
    largest = [float(hidden[:, 0].abs().max()) for hidden in states]
    assert all((size > 29_000) == (2 <= place <= 4) for place, size in enumerate(largest))
    assert all(hidden[windows[:2] != 0].abs().max() < 1000 for hidden in states)


def test_massive_activations_cost_half_at_most(
    pycode: Path, massive: Path, windows: Tensor, calibration: Calibration, tmp_path: Path
) -> None:
    """Beside the same model without them, on little text; counted by their size they cost 15 times as much."""
    wide = outliers.saved(outliers.widened(outliers.loaded(pycode))[0], pycode, tmp_path / "wide")
    found: list[float] = []
    for model in (wide, massive):
        quantize(model, tmp_path / f"out-{len(found)}", "int3:g64", calibration=calibration)
        loaded = llmquant.load(tmp_path / f"out-{len(found)}", dtype=torch.float32)
        found.append(metrics.divergence(outliers.loaded(model), loaded, windows[16:]).mean)
    assert found[1] < 1.5 * found[0]


def test_loud_tokens_count_relative_to_their_size() -> None:
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    hidden = hidden / hidden.norm(dim=-1, keepdim=True)
    hidden[0, 3] *= 1000
    expected = torch.ones(2, 9, 1)
    expected[0, 3] = 4 / 1000
    torch.testing.assert_close(quieted(hidden), expected)
    assert torch.equal(quieted(torch.zeros(1, 4, 8)), torch.ones(1, 4, 1))


def test_a_matrix_of_zeros_stays_one() -> None:
    """Whatever the residual stream lacks: its error would be infinitely many times itself."""
    generator = torch.Generator().manual_seed(0)
    stats = Stats.empty(32)
    x, lacking = torch.randn(200, 32, generator=generator), torch.randn(200, 8, generator=generator)
    stats.update(x, x, lacking)
    stats.hold(x[:50], x[:50], lacking[:50])
    fmt = formats.get("int4:g16")
    found = gptq.solve(torch.zeros(8, 32), stats, fmt)
    assert not fmt.decode(found.codes, found.grid).any()


def test_a_block_that_hardly_adds_anything_may_make_up_for_those_before(
    pycode: Path, calibration: Calibration, windows: Tensor, tmp_path: Path
) -> None:
    """Its own error is far beyond what its weights explain. What does not help is refused there too."""
    llama = outliers.loaded(pycode)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            llama.model.layers[2].get_submodule(name).weight *= 1e-3
    model = outliers.saved(llama, pycode, tmp_path / "model")
    manifest = quantize(model, tmp_path / "out", "int3:g64", calibration=calibration)
    assert {tensor["key"]: tensor["error"] for tensor in manifest["tensors"]}[DOWN] > 10

    def turn_round(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN.replace("weight", "weight_scale")].mul_(-4)

    spoil(tmp_path / "out", turn_round, shard=2)
    trust(tmp_path / "out", DOWN.removesuffix(".weight"))
    problems = verify(tmp_path / "out", model, windows[:2]).problems
    assert len(problems) == 1
    assert problems[0].startswith("model.layers.2: its outputs are off by")


def trust(folder: Path, name: str) -> None:
    """What was noted of a weight's error holds, as where scales were moved: outputs alone can tell now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["scaled"] = [{"source": name, "readers": []}]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def double(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight_scale"].mul_(2)


def test_a_token_that_is_massive_hides_no_error_of_the_others(massive: Path, windows: Tensor, tmp_path: Path) -> None:
    """The block whose MLP writes thousands at BOS, with an attention that is wrong."""
    quantize(massive, tmp_path / "out", "int8:g64")
    assert not verify(tmp_path / "out", massive, windows[:2]).problems
    spoil(tmp_path / "out", double, shard=1)
    trust(tmp_path / "out", "model.layers.1.self_attn.o_proj")
    problems = verify(tmp_path / "out", massive, windows[:2]).problems
    assert [problem.split(":")[0] for problem in problems] == ["model.layers.1"]


def test_where_scales_were_moved_the_weights_tell_what_was_swapped(
    pycode: Path, calibration: Calibration, windows: Tensor, tmp_path: Path
) -> None:
    model = outliers.saved(outliers.hidden_by_norms(outliers.loaded(pycode), 30.0), pycode, tmp_path / "model")
    manifest = quantize(model, tmp_path / "out", "int4:g64", calibration=calibration)
    readers = [name for note in manifest["scaled"] for name in note["readers"]]
    assert "model.layers.0.mlp.gate_proj" in readers

    def swap(tensors: dict[str, Tensor]) -> None:
        for suffix in ("weight_packed", "weight_scale"):
            gate, up = (f"model.layers.0.mlp.{part}_proj.{suffix}" for part in ("gate", "up"))
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    spoil(tmp_path / "out", swap)
    problems = verify(tmp_path / "out", model, windows[:2]).problems
    assert [problem.split(":")[0] for problem in problems] == [
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")
    ]


Refit = Callable[[Tensor, Tensor, formats.Grid, Format, Tensor], tuple[formats.Grid, Tensor]]


@pytest.mark.parametrize("fitted", [gptq.refine, refit.refit])
def test_a_scale_that_is_refit_to_much_less_is_one_that_the_file_holds(fitted: Refit) -> None:
    """The new scale, and not the old one with a difference added, which float32 rounds."""
    fmt = formats.get("nvfp4")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 32, generator=generator) * 1e-3
    w[0, 0] = 3.0
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    lattice = fmt.lattice(grid)
    places = (lattice.codes.int() == codes.int().unsqueeze(-1)).int().argmax(-1).to(torch.uint8)
    loud = fmt.storable(grid.scale * 3001, grid, slice(None))
    loud[0] = grid.scale[0]
    changed = fmt.moved(grid, scale=loud)
    mixing = torch.randn(32, 32, generator=generator)
    found, places = fitted(w, places, changed, fmt, algebra.damped(mixing @ mixing.T, 0.01))
    assert (found.scale < changed.scale / 100).any()
    _, read = fmt.unpack(fmt.pack(fmt.lattice(found).codes[places.int()], found), (64, 32))
    assert read.equals(found)
