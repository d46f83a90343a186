"""Which kernel a product runs, and how large its tiles are: measured figures where there are any, else a rule.

Measured ones are data: ``tuned/<name of the GPU>.json`` beside this file, as ``kernels/bench.py --tune`` writes it.
Nothing is ever tuned while a model runs. Knows neither triton nor a device.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .triton_layout import STEP, STRIP, Spec

TUNED = Path(__file__).with_name("tuned")
# Numbers of rows of x that are tuned; others take the settings of the next greater one.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Above these, decoding the weight once and torch's own product cost less than decoding it for every tile.
ROWS_DENSE = 256


class Settings(NamedTuple):
    """kernel: "gemv", "gemm" or "dense": decode, then torch's product."""

    kernel: str
    bm: int = 16  # rows of x that a program takes
    bn: int = 16  # rows of w
    split: int = 1  # parts of K that "gemm" gives to different programs; "gemv" splits it among its warps
    warps: int = 4
    stages: int = 3
    scaled: bool = False  # scales go onto the weights before the product


class Device(NamedTuple):
    name: str = ""
    processors: int = 132
    capability: int = 90  # 10 * major + minor


def settings_for(m: int, spec: Spec, device: Device) -> Settings:
    """For x of m rows."""
    bucket = next((bucket for bucket in BUCKETS if m <= bucket), None)
    if bucket is not None:
        found = _tuned(device.name).get(_key(bucket, spec))
        if found is not None:
            return found
    return legal(heuristic(m, spec, device), spec)


def heuristic(m: int, spec: Spec, device: Device) -> Settings:
    """From the counts of instructions and the bytes in flight, not from measurements on a GPU.

    Products with few rows want every processor to have some 40 KB of the weight on its way. With more rows, x is read
    anew from the cache of the second level for every bn rows of w, so bn grows with bm where registers allow.
    """
    strips = -(-spec.rows // STRIP)
    if m > ROWS_DENSE:
        return Settings("dense")
    # Where scales need the weights, the compiler for sm_100 reads weights without its pipeline in "gemm".
    many = 32 if device.capability >= 100 else 16 if spec.rows <= 8192 else 8
    if m <= many:
        bm = 8 if m <= 8 else 16 if m <= 16 else 32
        s = 1 if m <= 2 else 2
        warps = 8 if spec.steps % 8 == 0 and strips // s < 4 * device.processors else 4
        return Settings("gemv", bm, STRIP * s, warps=warps)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    bn = 256 if bm in (32, 64) else 128
    tiles = -(-spec.rows // bn) * -(-m // bm)
    split = max(1, min(spec.steps // 2, -(-2 * device.processors // tiles), 16))
    return Settings("gemm", bm, bn, split, warps=8 if bm > 16 else 4, stages=2 if bm == 128 else 3, scaled=bm >= 64)


def legal(settings: Settings, spec: Spec) -> Settings:
    """With scales before the product where the kernel or the numbers need that, and no more parts than steps."""
    if settings.kernel == "dense":
        return settings
    table = spec.numbers.startswith("tab")
    if spec.units == 0:
        scaled = False
    elif settings.kernel == "gemv":
        scaled = table  # every product of a warp is as short as the columns of a scale
    else:
        scaled = settings.scaled or table or spec.units > 2
    share = -(-spec.steps // settings.split)
    return settings._replace(scaled=scaled, split=-(-spec.steps // share))


def _key(bucket: int, spec: Spec) -> str:
    scale = f"{spec.scale}x{spec.units}" if spec.units else "row"
    zero = "zeros" if spec.zero != spec.zero else "one"
    return f"{spec.numbers} {scale} {zero} {spec.rows}x{spec.columns} m{bucket}"


@lru_cache(maxsize=8)
def _tuned(name: str) -> dict[str, Settings]:
    path = TUNED / f"{slug(name)}.json"
    if not name or not path.exists():
        return {}
    return {key: Settings(**value) for key, value in json.loads(path.read_text())["settings"].items()}


def slug(name: str) -> str:
    """The name of a GPU as that of its file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def is_even(settings: Settings, spec: Spec) -> bool:
    """No column is missing of the last step of any warp."""
    return spec.layout_columns % STEP == 0 and (settings.kernel != "gemv" or spec.steps % settings.warps == 0)
