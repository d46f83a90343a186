"""Reading the options of a format's name: `g128`, `channel`, `fp32` and words of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmquant.errors import PlanError

SCALE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SCALE_NAMES = {dtype: name for name, dtype in SCALE_TYPES.items()}
# Option -> the fields of the format that it sets.
Words = Mapping[str, Mapping[str, Any]]


def granularities(*words: str) -> Words:
    return {word: {"granularity": word} for word in words}


def scale_types() -> Words:
    return {name: {"scale_dtype": dtype} for name, dtype in SCALE_TYPES.items()}


def read(name: str, tokens: list[str], *words: Words, groups: bool = True) -> dict[str, Any]:
    """The fields that tokens set, for a format called `name`. groups: whether `g<columns>` is one of its options.

    Raises PlanError for a token that is neither a group nor one of the words.
    """
    known = {word: fields for some in words for word, fields in some.items()}
    found: dict[str, Any] = {}
    for token in tokens:
        if groups and token[:1] == "g" and token[1:].isdecimal():
            found["granularity"] = int(token[1:])
        elif token in known:
            found |= known[token]
        else:
            options = ", ".join((["g<columns>"] if groups else []) + list(known)) or "none"
            raise PlanError(f"{name} has no option {token!r}: options are {options}")
    return found


def spec(*parts: str | int | torch.dtype | None) -> str:
    """The name that `read` takes apart: words as they are, columns of a group, the type of a scale; no None."""
    names = (SCALE_NAMES[part] if isinstance(part, torch.dtype) else part for part in parts if part is not None)
    return ":".join(f"g{name}" if isinstance(name, int) else name for name in names)
