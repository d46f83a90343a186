"""Training over a frozen quantized model: gradients are those of the dense model, adapters learn, codes stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import llmquant
from llmquant import formats
from llmquant.errors import PlanError
from llmquant.linear import QuantLinear


@pytest.fixture(scope="module")
def folder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "q"
    llmquant.quantize(pycode, path, format="int4:g64", quality="fast", report=False)
    return path


@pytest.mark.parametrize("spec", ["int4:g32:bf16", "nf4:g32:bf16", "mx6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_dense_layer(spec: str, dtype: torch.dtype) -> None:
    fmt, generator = formats.get(spec), torch.Generator().manual_seed(0)
    layer = QuantLinear(fmt, 64, 48, bias=True, dtype=dtype)
    packed = fmt.pack(*fmt.quantize(torch.randn(48, 64, generator=generator)))
    layer.load_state_dict({**packed, "bias": torch.randn(48, generator=generator).to(dtype)})
    x = torch.randn(2, 3, 64, generator=generator).to(dtype).requires_grad_()
    up = torch.randn(2, 3, 48, generator=generator).to(dtype)
    layer(x).backward(up)
    expected = torch.autograd.grad(x.double() @ layer.dequantize().double().T, x, up.double())[0]
    assert x.grad is not None
    coarse = dtype == torch.bfloat16  # the weight is rounded to it, too, and 48 terms are summed
    torch.testing.assert_close(x.grad, expected, rtol=0.02 if coarse else 1e-5, atol=0.1 if coarse else 1e-4)
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers in old words
def test_adapters_learn_and_codes_stay(folder: Path, pycode: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(llmquant.load(folder, dtype=torch.float32))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(0)
    config = llmquant.adapters.over_quantized(
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trained: Any = peft.get_peft_model(model, config)
    text = "def once_upon_a_time(princess):\n    return princess.sleeps(100, until=kiss)\n" * 3
    tokens = AutoTokenizer.from_pretrained(pycode)(text, return_tensors="pt").input_ids
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in weights) == 6 * 2 * 4 * (128 + 128)
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = trained(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) if name in before else True
    with pytest.raises(PlanError, match="cannot be merged into codes"):
        trained.merge_and_unload()
    trained.save_pretrained(tmp_path / "adapter")
    fresh = llmquant.load(folder, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=config)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, trained.eval()(tokens).logits, rtol=1e-4, atol=1e-4)


def test_peft_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    llmquant.adapters._layer.cache_clear()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PlanError, match=r"llmquant\[peft\]"):
        llmquant.adapters.over_quantized(object())
