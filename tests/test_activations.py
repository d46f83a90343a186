"""Rounded activations: against loops by hand, torch's own quantizer, brute force, and the figures that eval prints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llmquant
from llmquant import errors
from llmquant.activations import OBSERVERS, Activations, rounded, thresholds
from llmquant.formats.clipping import HISTOGRAM_BINS
from llmquant.linear import QuantLinear

X = torch.randn(5, 24, generator=torch.Generator().manual_seed(2)) * torch.tensor([1, 8, 0.01, 100, 0])[:, None]


@pytest.mark.parametrize("bits", [8, 4])
def test_each_token_is_rounded_on_its_own_scale(bits: int) -> None:
    found, top = Activations.parse(f"int{bits}:dynamic").per_token(X), 2 ** (bits - 1) - 1
    for row, rounded_row in zip(X, found, strict=True):
        scale = float(row.abs().max()) / top or 1.0
        expected = torch.fake_quantize_per_tensor_affine(row, scale, 0, -top, top)
        torch.testing.assert_close(rounded_row, expected)


def test_a_zero_point_makes_all_levels_of_a_one_sided_token_usable() -> None:
    x = X.abs() + 0.1
    found = Activations.parse("int8:dynamic:asym").per_token(x)
    for row, rounded_row in zip(x.tolist(), found.tolist(), strict=True):
        scale = max(row) / 255  # the range begins at zero
        assert rounded_row == pytest.approx([round(value / scale) * scale for value in row], abs=1e-5 * max(row))
    both = Activations.parse("int8:dynamic:asym").per_token(X)
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    assert ((both - X).abs() <= ((high - low) / 255 * 1.001)[:, None] + 1e-12).all()


def histogram(values: np.ndarray, largest: float) -> Tensor:
    return torch.tensor(np.histogram(np.abs(values), HISTOGRAM_BINS, (0, largest))[0]).float()


def test_observers_reach_where_their_definitions_say() -> None:
    values = np.random.default_rng(0).standard_t(4, 200_000)
    largest = float(np.abs(values).max())
    counts, width = histogram(values, largest), largest / HISTOGRAM_BINS
    found = {name: Activations(8, "static", name).threshold(counts, largest) for name in OBSERVERS}
    assert found["minmax"] == largest
    assert found["percentile"] == pytest.approx(float(np.quantile(np.abs(values), 0.9999)), abs=1.01 * width)

    def squared_error(reach: float) -> float:
        scale = reach / 127
        return float(((np.clip(np.round(values / scale), -127, 127) * scale - values) ** 2).mean())

    least = min(squared_error(stop * width) for stop in range(128, HISTOGRAM_BINS + 1, 16))
    assert squared_error(found["mse"]) == pytest.approx(least, rel=1e-2)
    assert squared_error(largest) > 1.2 * least

    def divergence(stop: int) -> float:
        p = counts.double().tolist()
        cut = p[:stop]
        q = [0.0] * stop
        for level in range(128):
            bins = [i for i in range(stop) if i * 128 // stop == level]
            used = [i for i in bins if cut[i] > 0]
            for i in used:
                q[i] = sum(cut[j] for j in bins) / len(used)
        cut[-1] += sum(p[stop:])
        return sum(
            a / sum(cut) * (math.log(a / sum(cut)) - math.log(max(b / sum(q), 1e-6)))
            for a, b in zip(cut, q, strict=True)
            if a > 0
        )

    best = round(found["kl"] / width)
    assert 128 <= best < HISTOGRAM_BINS
    assert all(divergence(best) <= divergence(stop) + 1e-9 for stop in (128, best - 16, best + 16, HISTOGRAM_BINS))


@pytest.fixture(scope="module")
def folder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("activations") / "w8"
    llmquant.quantize(pycode, output, format="int8:channel", quality="fast", verify=False, report=False)
    return output


def test_every_quantized_layer_is_fed_with_rounded_inputs(folder: Path) -> None:
    model = llmquant.load(folder, dtype=torch.float32)
    windows = torch.randint(0, 1500, (2, 32), generator=torch.Generator().manual_seed(0))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    seen: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        plain = model(windows).logits
    for handle in handles:
        handle.remove()
    static = Activations.parse("int8:static")
    assert thresholds(model, layers, static, windows) == pytest.approx(seen)
    inputs: list[Tensor] = []
    with torch.no_grad(), rounded(model, static, windows) as count:
        name, layer = next(iter(layers.items()))
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        coarse = model(windows).logits
        handle.remove()
    assert count == len(layers) == 42
    steps = inputs[0] / (seen[name] / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert not torch.equal(coarse, plain)
    with torch.no_grad():
        assert torch.equal(model(windows).logits, plain)  # given back as it was lent


def test_eval_says_what_eight_and_four_bits_cost(folder: Path, pycode: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.json"
    text.write_text(json.dumps([Path(llmquant.__file__).parent.joinpath("qat.py").read_text()] * 4))
    kl = {}
    for spec in (None, "int8:dynamic", "int4:dynamic"):
        found = llmquant.evaluate(folder, str(text), reference=pycode, max_windows=2, window=128, activations=spec)
        kl[spec] = found["kl_mean"]
    assert kl[None] < kl["int8:dynamic"] < 0.02 < kl["int4:dynamic"]


def test_what_cannot_be_rounded_is_refused(folder: Path) -> None:
    for spec in ("int8", "int9:dynamic", "int8:static:median", "int8:dynamic:mse", "fp8:dynamic", "int:dynamic"):
        with pytest.raises(errors.PlanError, match="are unknown"):
            Activations.parse(spec)
    dense = rounded(nn.Linear(2, 2), Activations(8, "dynamic"))
    with pytest.raises(errors.PlanError, match="no quantized linear layer"), dense:
        pass
    with pytest.raises(errors.PlanError, match="--calibration"):
        llmquant.evaluate(folder, "none.txt", activations="int8:static")
    with pytest.raises(errors.NonFiniteInput):
        Activations.parse("int8:dynamic").per_token(torch.tensor([[1.0, float("nan")]]))
