"""Number formats by name: `get("int4:g128")`.

To add one: write a file with a Format, and add its name here.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from llmquant.errors import CheckpointError, PlanError
from llmquant.formats import (
    binary,
    floating,
    integer,
    kmeans,
    microexponent,
    mx,
    nvfp4,
    table,
    ternary,
    vsquant,
)
from llmquant.formats.base import Format, Grid, TensorSpec
from llmquant_kernels import cpu_compiled

__all__ = ["FAMILIES", "Format", "Grid", "TensorSpec", "get", "listed_modules"]

# Who makes weights for the kernels brings the loops that those for CPUs run. numba takes half a second to import.
cpu_compiled.use(cache(partial(importlib.import_module, "llmquant.cpu")))

# Pattern of the name before the first colon -> parser of (name, options).
FAMILIES: dict[str, Callable[[str, list[str]], Format]] = {
    "int[2-8]": integer.parse,
    "mxfp8_e4m3|mxfp8_e5m2|mxfp6_e3m2|mxfp6_e2m3|mxfp4|mxint8": mx.parse,
    "nvfp4": nvfp4.parse,
    "mx[469]": microexponent.parse,
    "vsq[3-8]": vsquant.parse,
    "fp8_e4m3|fp8_e5m2": floating.parse,
    "nf4": table.parse_nf4,
    "table": table.parse_table,
    "kmeans[1-8]": kmeans.parse,
    "ternary": ternary.parse,
    "binary": binary.parse,
}


def get(spec: str) -> Format:
    """The format that `spec` names, such as "int4:g128", "int8:channel", "int3:g64:asym:bf16".

    Raises PlanError for an unknown name or option.

    Examples:
        >>> import torch
        >>> fmt = llmquant.formats.get("int4:g4:fp32")
        >>> codes, grid = fmt.quantize(torch.tensor([[0.1, -0.8, 0.3, 0.4]]), clip="minmax")
        >>> codes.tolist(), grid.scale.tolist()
        ([[1, -8, 3, 4]], [[0.10000000149011612]])
        >>> sorted(fmt.pack(codes, grid)), fmt.bits_per_weight((4096, 4096))
        (['weight_packed', 'weight_scale', 'weight_shape'], 12.0...)
    """
    name, *options = spec.split(":")
    for pattern, parse in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return parse(name, options)
    raise PlanError(f"format {spec!r} is unknown: known are {', '.join(FAMILIES)} (see `llmquant formats`)")


def listed_modules(listed: Any) -> dict[str, Format]:
    """{name of a module: its format}, of the "formats" {spec: names of modules} in a folder's config.json.

    Raises CheckpointError where it is malformed, PlanError for a format that is not known.
    """
    if not isinstance(listed, dict):
        raise CheckpointError('config.json: quantization_config has no "formats", which lists the modules of each')
    found: dict[str, Format] = {}
    for spec, names in listed.items():
        fmt = get(spec)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f'config.json: "formats" must give {spec} a list of module names')
        for name in names:
            if name in found:
                raise CheckpointError(f"config.json: {name} is listed twice, as {found[name].spec} and as {spec}")
            found[name] = fmt
    return found
