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

from .triton_layout import STEP, STRIP, Spec, high_bits

TUNED = Path(__file__).with_name("tuned")
# Numbers of rows of x that are tuned; others take the settings of the next greater one.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Above these, decoding the weight once and torch's own product cost less than decoding it for every tile.
ROWS_DENSE = 256
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a scale; others have one


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
    """Of no name: an H200, for the interpreter and for counting instructions."""

    name: str = ""
    processors: int = 132
    capability: int = 90  # 10 * major + minor
    shared: int = 227 * 1024  # bytes that a program may have


def settings_for(m: int, spec: Spec, device: Device) -> Settings:
    """For x of m rows."""
    bucket = next((bucket for bucket in BUCKETS if m <= bucket), None)
    if bucket is not None:
        found = _tuned(device.name).get(key(bucket, spec))
        if found is not None:
            return found
    return legal(heuristic(m, spec, device), spec, device)


def settings_for_experts(tokens: int, experts: int, spec: Spec, device: Device) -> Settings:
    """For so many rows of x, shared out among experts. Nobody waits to learn how many each has.

    Tiles have room for twice the mean, so that most experts need one, and read their weight once.
    """
    m = min(tokens, -(-2 * tokens // experts), ROWS_DENSE)
    return legal(heuristic(m, spec, device)._replace(split=1), spec, device)


def heuristic(m: int, spec: Spec, device: Device) -> Settings:
    """From the counts of instructions and the bytes in flight, not from measurements on a GPU.

    Products with few rows want every processor to have some 40 KB of the weight on its way. With more rows, x is read
    anew from the cache of the second level for every bn rows of w, so bn grows with bm where registers allow.
    """
    strips = -(-spec.rows // STRIP)
    if m > ROWS_DENSE:
        return Settings("dense")
    if m <= (16 if spec.rows <= 8192 or device.capability >= 100 else 8):
        s = 1 if m <= 2 else 2
        warps = 8 if spec.steps % 8 == 0 and strips // s < 4 * device.processors else 4
        return Settings("gemv", 8 if m <= 8 else 16, STRIP * s, warps=warps)
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    # Numbers of two parts and tables take too many registers for a wide tile with many rows of x.
    wide = not high_bits(spec.bits) and spec.numbers[:3] not in ("tab", "own", "row")
    bn = 256 if bm == 32 or (bm == 64 and wide) else 128
    tiles = -(-spec.rows // bn) * -(-m // bm)
    split = max(1, min(spec.steps // 2, -(-2 * device.processors // tiles), 16))
    return Settings("gemm", bm, bn, split, warps=8 if bm > 16 else 4, stages=2 if bm == 128 else 3, scaled=bm >= 64)


def legal(settings: Settings, spec: Spec, device: Device) -> Settings:
    """The same so that it can run: scales where the kernel or the numbers need them, what fits into shared memory."""
    if settings.kernel == "dense":
        return settings
    table = spec.numbers[:3] in ("tab", "own")  # one of all rows, or in memory: no 16-bit floats by themselves
    if spec.units == 0:
        scaled = False
    elif settings.kernel == "gemv":
        scaled = table  # every product of a warp is as short as the columns of a scale
    else:
        scaled = settings.scaled or table or spec.units > 2
    share = -(-spec.steps // settings.split)
    # Looking up tables in memory would be run ahead as well, each with room of its own in shared memory.
    stages = 1 if spec.numbers[:3] == "own" else settings.stages
    settings = settings._replace(scaled=scaled, split=-(-spec.steps // share), stages=stages)
    while shared_bytes(settings, spec) > device.shared:
        if settings.stages > 2:
            settings = settings._replace(stages=2)
        elif settings.kernel == "gemv" and settings.warps > 1:
            settings = settings._replace(warps=settings.warps // 2)
        elif settings.kernel == "gemm" and settings.bn > 64:
            settings = settings._replace(bn=settings.bn // 2, warps=4)
        else:
            return Settings("dense")
    return settings


def shared_bytes(settings: Settings, spec: Spec) -> int:
    """Shared memory of a program, about: what is on its way for the steps ahead, as triton 3.6 to 3.9 lay it out."""
    if settings.stages < 2:
        return 0
    scale = -(-spec.units * BYTES.get(spec.scale, 1) // 4) * 4
    zero = 0 if spec.zero == spec.zero else -(-spec.units // 2) * 4
    weights = settings.bn * (STEP * spec.bits // 8 + scale + zero)
    x = settings.bm * STEP * 2
    if settings.kernel == "gemv":
        return (settings.stages - 1) * settings.warps * (weights + x) + 1024
    return (settings.stages - 1) * weights + settings.stages * x + 2048


def key(bucket: int, spec: Spec) -> str:
    """Of a weight and a number of rows in the tuned settings."""
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
