"""Attention of a single query, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmquant.attention import attention, of_one_query


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "seen", "added", "of heads"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_is_what_transformers_finds(queries: int, groups: int, mask: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, queries, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, groups, 11, 8, generator=generator).to(dtype) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 6 // groups  # type: ignore[assignment]
    seen = torch.rand(3, 6 if mask == "of heads" else 1, queries, 11, generator=generator) < 0.7
    seen[..., 0] = True
    given = None if mask == "none" else torch.where(seen, 0.0, -1e30).to(dtype) if mask == "added" else seen
    found, _ = attention(module, query, key, value, given, scaling=0.3)
    wanted, _ = sdpa_attention_forward(module, query, key, value, given, scaling=0.3)
    torch.testing.assert_close(
        found, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 * dtype.itemsize
    )


def test_it_is_asked_while_it_is_wanted_and_no_longer(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokens = torch.arange(3, 13).unsqueeze(0)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = model.generate(tokens, max_new_tokens=8, do_sample=False)
    with of_one_query():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
        assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), plain)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
