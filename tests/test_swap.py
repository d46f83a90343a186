"""The original and the quantized weights of a block, each in place in turn, or neither."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from architectures import make_checkpoint

from llmquant import formats
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.swap import WeightSwap


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_rested_is_as_it_was(stored: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", dtype=stored)
    model = StreamedModel(Checkpoint(folder), dtype=torch.float32)
    fmt, swap = formats.get("int4:g48"), WeightSwap()
    with model.loaded(0):
        first, second, *_ = model.targets(0).values()
        weights = {target.name: model.module(target).get_parameter("weight") for target in (first, second)}
        originals = {name: weight.detach().clone() for name, weight in weights.items()}
        decoded = {name: fmt.decode(*fmt.quantize(original)) for name, original in originals.items()}
        swap.put(model, first, decoded[first.name].clone(), lambda: decoded[first.name].clone())
        swap.put(model, second, decoded[second.name])  # which nothing makes again
        original, quantized = map(weakref.ref, swap.pairs[first.parameter][1:])
        with swap.resting():
            assert quantized() is None
            assert (original() is None) == (stored != torch.float32)
            assert weights[first.name].numel() == 0
            assert torch.equal(weights[second.name], decoded[second.name])
        for name, weight in weights.items():
            assert torch.equal(weight, decoded[name])
        with swap.original():
            for name, weight in weights.items():
                assert torch.equal(weight, originals[name])
                assert weight.dtype == torch.float32
