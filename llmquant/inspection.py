"""What a finished folder holds, and whether it is still what was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import llmquant_kernels
from llmquant import formats
from llmquant.checkpoint import MANIFEST, Checkpoint, is_plain_name, read_json, sha256
from llmquant.errors import CheckpointError, LlmquantError
from llmquant.formats.base import all_finite

# Of a manifest: what is read of it, here and by the command line.
FIELDS = {
    "files": dict,
    "tensors": list,
    "model": str,
    "bytes_before": int,
    "bytes_after": int,
    "bits_per_weight": float,
}


def manifest(folder: Path) -> dict[str, Any]:
    """The folder's llmquant.json. Raises CheckpointError if it has none, then it is not a finished result; or if it is
    none that llmquant writes.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}: not a finished result of llmquant")
    found = read_json(path)
    for key, kind in FIELDS.items():
        if not isinstance(found.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} is missing or damaged")
    for name, facts in found["files"].items():
        if not is_plain_name(name) or not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
            raise CheckpointError(f"{path}: {name!r} is not the entry of a file in this folder")
    for tensor in found["tensors"]:
        if not _is_tensor(tensor):
            raise CheckpointError(f"{path}: an entry of 'tensors' is damaged: {str(tensor)[:80]}")
    return found


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "key", "format")):
        return False
    shape, figures = (
        entry.get("shape"),
        [entry.get("error", 0), entry.get("bits_per_weight"), entry.get("output_error", 0)],
    )
    expert = entry.get("expert", 0)
    return (
        isinstance(expert, int)
        and expert >= 0
        and isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(size, int) and 0 < size < 2**31 for size in shape)
        and all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures)
    )


def kernels(folder: Path, facts: dict[str, Any], device: str) -> dict[str, tuple[str, dict[str, str]]]:
    """{matrix: (its kernel on such a device, why each faster one refuses)}, for inputs of the model's type.

    facts: the folder's manifest. Modules decide: of an embedding rows are looked up, and convolutions are decoded.
    """
    config = read_json(folder / "config.json")
    config = {**config.get("text_config", {}), **config}
    name = str(config.get("dtype", config.get("torch_dtype")))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    found = {}
    for tensor in facts["tensors"]:
        own = formats.get(tensor["format"]).facts((tensor["shape"][0], tensor["shape"][1]))
        found[tensor["name"]] = llmquant_kernels.choose(replace(own, device=device), dtype)
    return found


def verify(folder: Path, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> list[str]:
    """Hash every file, decode every quantized tensor. Returns what is wrong, one line each; nothing: all is well."""
    facts = manifest(folder)
    problems = []
    files, tensors = facts["files"], facts["tensors"]
    for done, (name, expected) in enumerate(files.items()):
        progress(name, done, len(files) + len(tensors))
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256(path) != expected["sha256"]:
            problems.append(f"{name}: SHA-256 differs from that written ({path.stat().st_size:,} bytes now)")
    if not tensors:  # an export whose matrices are stored in another way
        return problems
    try:
        checkpoint = Checkpoint(folder)
    except LlmquantError as error:
        return [*problems, str(error)]
    for done, tensor in enumerate(tensors):
        progress(tensor["name"], len(files) + done, len(files) + len(tensors))
        problems += _decode(checkpoint, tensor)
    return problems


def _decode(checkpoint: Checkpoint, tensor: dict[str, Any]) -> list[str]:
    fmt = formats.get(tensor["format"])
    shape = (tensor["shape"][0], tensor["shape"][1])
    pieces, layout = fmt.pieces(tensor["key"], shape), fmt.layout(shape)
    expert = tensor.get("expert")  # all experts of a parameter lie in the same tensors
    missing = [name for name in pieces if name not in checkpoint.names()]
    if missing:
        return [f"{missing[0]}: missing"]
    wrong = [
        f"{name}: is {checkpoint.dtype(name)} {checkpoint.shape(name)}, should be {spec.dtype} {spec.shape}"
        for name, spec in ((name, layout[suffix]) for name, suffix in pieces.items())
        if checkpoint.dtype(name) != spec.dtype
        or checkpoint.shape(name)[0 if expert is None else 1 :] != spec.shape
        or (expert is not None and expert >= checkpoint.shape(name)[0])
    ]
    if wrong:
        return wrong
    named = fmt.named(checkpoint.tensors(list(pieces)), tensor["key"], shape, expert)
    if not all_finite(fmt.decode(*fmt.unpack(named, shape))):
        return [f"{tensor['key']}: decodes to NaN or Inf"]
    return []
