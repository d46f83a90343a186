"""Every number format all the way: quantize, inspect, load, compute, save again, size; and one of your own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import make_checkpoint
from test_pipeline import dense_twin, quantize
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import formats, inspection, metrics
from llmquant.format_table import SPECS
from llmquant.formats.scalar import Scalar
from llmquant.recipe import Recipe, Rule

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
TOKENS = torch.arange(1, 49).view(2, 24)
# One of every family, with groups that leave a short one in rows of 48 and 80.
CHOSEN = [
    *(
        "int3:g32:asym",
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxint8",
        "nvfp4",
        "mx4",
        "mx6",
    ),
    *("mx9", "vsq4:s4", "vsq8:s6", "fp8_e4m3:channel", "fp8_e4m3:block", "fp8_e5m2:tensor", "nf4:g32", "nf4:g32:dq"),
    *("table:-1,-0.3,0,0.4,1:g32", "kmeans3:channel", "kmeans3:g32", "kmeans2:tensor", "ternary:g32", "binary:g32"),
]


def ragged_llama(folder: Path) -> Path:
    """Two layers whose rows, of 64, 80 and 120, are not all whole groups of 16 or 32."""
    return make_checkpoint(folder, "llama", hidden_size=80, intermediate_size=120, num_hidden_layers=2)


def assert_serves(model: Path, folder: Path, again: Path) -> None:
    """Logits of the decoded weights; after saving and loading once more the same, bit for bit; sizes add up."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = loaded(input_ids=TOKENS).logits
    expected = dense_twin(model, folder)(input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(input_ids=TOKENS).logits, found)
    facts = json.loads((folder / "llmquant.json").read_text())
    size = metrics.stored_size(folder)
    assert size.bits_per_weight == pytest.approx(facts["bits_per_weight"], rel=1e-12)
    assert size.quantized_weights == sum(shape[0] * shape[1] for shape in (t["shape"] for t in facts["tensors"]))
    assert metrics.stored_size(again).bits_per_weight == pytest.approx(facts["bits_per_weight"], rel=1e-12)


@pytest.mark.parametrize("spec", CHOSEN)
def test_a_model_of_one_format(spec: str, tmp_path: Path) -> None:
    model = ragged_llama(tmp_path / "model")
    manifest = quantize(model, tmp_path / "out", spec)
    assert len(manifest["tensors"]) == 14
    assert all(0 <= tensor["error"] < 1 for tensor in manifest["tensors"])
    assert inspection.verify(tmp_path / "out") == []
    assert_serves(model, tmp_path / "out", tmp_path / "again")


def test_a_model_of_many_formats(tmp_path: Path) -> None:
    model = ragged_llama(tmp_path / "model")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    specs = ["nvfp4", "mx6", "kmeans3:channel", "nf4:g32:dq", "mxfp4", "ternary:g32", "int8:channel"]
    recipe = Recipe(tuple(Rule(f"*{name}", spec) for name, spec in zip(names, specs, strict=True)))
    manifest = quantize(model, tmp_path / "out", recipe)
    assert {tensor["format"].split(":")[0] for tensor in manifest["tensors"]} == {s.split(":")[0] for s in specs}
    assert_serves(model, tmp_path / "out", tmp_path / "again")


def test_what_is_chosen_here_is_of_every_family() -> None:
    for pattern in formats.FAMILIES:
        assert any(re.fullmatch(pattern, spec.split(":")[0]) for spec in CHOSEN), pattern
        assert any(re.fullmatch(pattern, spec.split(":")[0]) for spec in SPECS) or pattern == "table", pattern


def worked_example() -> str:
    """The Python block of the documentation that adds a format."""
    section = PAGE.read_text().split("## A format of your own")[1]
    match = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert match
    return match.group(1)


def test_the_format_of_the_readme_is_added_in_forty_lines_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = worked_example()
    assert len(code.splitlines()) < 40
    monkeypatch.setattr(formats, "FAMILIES", dict(formats.FAMILIES))
    module = ModuleType("powers")
    monkeypatch.setitem(sys.modules, "powers", module)  # where dataclasses look their annotations up
    exec(compile(code, PAGE.name, "exec"), vars(module))
    fmt = formats.get("pow2:g64").stored_for(torch.float32)
    assert isinstance(fmt, Scalar)
    assert formats.get(fmt.spec) == fmt
    assert fmt.bits_per_weight((64, 4096)) == 4.25
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    for clip in ("minmax", "search"):
        decoded = fmt.decode(*fmt.quantize(w, clip=clip))
        ratio = (decoded.view(32, 4, 64) / fmt.fit(w, clip=clip).scale.unsqueeze(-1)).abs().log2()
        assert torch.equal(ratio, ratio.round().clamp(-7, 0))
    model = ragged_llama(tmp_path / "model")
    quantize(model, tmp_path / "out", "pow2:g16")
    assert_serves(model, tmp_path / "out", tmp_path / "again")
    assert llmquant.load(tmp_path / "out").config.quantization_config.formats
