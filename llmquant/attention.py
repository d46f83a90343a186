"""Attention of one new token on a CPU, where torch takes longer for one query than for two, and reads keys often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa"


@contextmanager
def of_one_query() -> Iterator[None]:
    """While it is entered, models that attend by torch's function ask this file's for a single query on a CPU."""
    before = ALL_ATTENTION_FUNCTIONS[NAME]
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(NAME, before)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: query (batch, heads, queries, size), key and value (batch,
    groups, tokens, size), mask: true where a token is seen, or what is added. Returns (batch, queries, heads, size).

    The heads of a group are the queries of one, so that its keys are read once; where that is one, there are two of it,
    for which torch takes half the time.
    """
    plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None and not kwargs.get("dropout")
    if query.shape[2] != 1 or query.device.type != "cpu" or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    together = query.reshape(batch, groups, heads // groups, size)
    if attention_mask is not None and attention_mask.shape[1] > 1:
        attention_mask = attention_mask.reshape(len(attention_mask), groups, heads // groups, -1)
    if heads == groups and query.dtype != torch.float32:
        together = together.expand(-1, -1, 2, -1)
    found = functional.scaled_dot_product_attention(together, key, value, attention_mask, scale=scaling)
    return found[:, :, : heads // groups].reshape(batch, 1, heads, value.shape[-1]), None
