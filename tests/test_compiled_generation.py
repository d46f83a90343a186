"""Decoding with a static cache, its step compiled whole: what `eval/decode_speed.py` measures on a GPU, on a CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import CompileConfig


@pytest.mark.parametrize("spec", ["int4:g64", "mxfp4"])
def test_a_compiled_step_writes_the_same_tokens(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import decode_speed

    monkeypatch.setattr(sys, "argv", ["decode_speed.py", "--tiny", "--device", "cpu"])
    model = decode_speed.build(spec, decode_speed.arguments())
    tokens = torch.arange(8).view(1, -1)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(tokens), "cache_implementation": "static"}
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # it would leave CPUs alone
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model.generate(tokens, disable_compile=True, **options)
        compiled = model.generate(tokens, compile_config=config, **options)
    assert torch.equal(plain, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
