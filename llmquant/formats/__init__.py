"""Number formats by name: `get("int4:g128")`.

To add one: write a file with a Format, and add its name here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from llmquant.errors import PlanError
from llmquant.formats import integer
from llmquant.formats.base import Format, Grid, TensorSpec

__all__ = ["FAMILIES", "Format", "Grid", "TensorSpec", "get"]

# Pattern of the name before the first colon -> parser of (name, options).
FAMILIES: dict[str, Callable[[str, list[str]], Format]] = {
    r"int[2-8]": integer.parse,
}


def get(spec: str) -> Format:
    """The format that `spec` names, such as "int4:g128", "int8:channel", "int3:g64:asym:bf16".

    Raises PlanError for an unknown name or option.
    """
    name, *options = spec.split(":")
    for pattern, parse in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return parse(name, options)
    raise PlanError(f"format {spec!r} is unknown: known are {', '.join(FAMILIES)} (see `llmquant formats`)")
