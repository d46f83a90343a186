"""Every architecture through the whole flow: quantized, saved, loaded, and compared with the decoded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MOE, SEEING, make_checkpoint
from test_pipeline import SMALL, dense_twin, quantize
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import llmquant
from llmquant import inspection, pipeline

# Without calibration those whose weights lie otherwise: fused, transposed, as experts in one tensor or two.
FAST = ("llama", "phi3", "gpt2", "mixtral", "gpt_oss", "qwen3_next", "llama4")


@pytest.mark.parametrize(
    ("name", "calibration"),
    [(name, None) for name in FAST] + [(name, SMALL) for name in [*ARCHITECTURES, *MOE]],
    ids=lambda value: value if isinstance(value, str) else "calibrated" if value else "fast",
)
def test_every_architecture_loads_with_the_logits_of_the_decoded_weights(
    name: str, calibration: pipeline.Calibration | None, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "model", name, dtype=torch.float32, max_shard_size="100KB")
    manifest = quantize(
        model, tmp_path / "out", "int4:g48" if name in ARCHITECTURES else "int4:g16", calibration=calibration
    )
    assert len(manifest["tensors"]) >= 3 * 4
    assert not [kept for kept in manifest["kept_dense"] if "conv1d" not in kept["name"]]
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = loaded(ids).logits
        twin = dense_twin(model, tmp_path / "out")
        rounded = twin(ids).logits
        twin.set_experts_implementation("eager")  # the others know no float64
        exact = twin.double()(ids).logits.double()
        # How much a model makes of the rounding of its own products is its matter: qwen3_next's state a lot.
        nearness = 1e-5 + 8 * float((rounded - exact).abs().max())
        assert nearness < (4e-3 if name == "qwen3_next" else 1e-3)  # or nothing would be compared
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=nearness)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(ids).logits, found)
    assert inspection.verify(tmp_path / "out") == []


@pytest.mark.parametrize("name", SEEING)
def test_of_a_model_that_sees_the_language_part_is_quantized(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", name, dtype=torch.float32)
    manifest = quantize(model, tmp_path / "out", "int4:g16", calibration=SMALL)
    names = [tensor["name"] for tensor in manifest["tensors"]]
    assert len(names) == 3 * 7
    assert all("language_model" in name for name in names)
    assert all(tensor["tokens"] == 3 * 32 for tensor in manifest["tensors"])
    loaded = llmquant.load(tmp_path / "out")
    twin = dense_twin(model, tmp_path / "out", AutoModelForImageTextToText)
    ids = torch.randint(6, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, twin(ids).logits, rtol=1e-5, atol=1e-5)
    eyes = {key: value for key, value in twin.state_dict().items() if "language_model" not in key}
    assert len(eyes) > 20
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in eyes.items())
