"""What a finished folder holds, and whether it is still what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmquant import formats
from llmquant.checkpoint import MANIFEST, Checkpoint, sha256
from llmquant.errors import CheckpointError, LlmquantError
from llmquant.formats.base import all_finite


def manifest(folder: Path) -> dict[str, Any]:
    """The folder's llmquant.json. Raises CheckpointError if it has none: then it is not a finished result."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}: not a finished result of llmquant")
    try:
        return dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}): the folder is damaged") from None


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
    base = tensor["key"].removesuffix("weight")
    layout = fmt.layout(shape)
    missing = [base + suffix for suffix in layout if base + suffix not in checkpoint.names()]
    if missing:
        return [f"{missing[0]}: missing"]
    wrong = [
        f"{base + suffix}: is {checkpoint.dtype(base + suffix)} {checkpoint.shape(base + suffix)}, "
        f"should be {spec.dtype} {spec.shape}"
        for suffix, spec in layout.items()
        if (checkpoint.shape(base + suffix), checkpoint.dtype(base + suffix)) != (spec.shape, spec.dtype)
    ]
    if wrong:
        return wrong
    stored = checkpoint.tensors([base + suffix for suffix in layout])
    named = {name.removeprefix(base): value for name, value in stored.items()}
    if not all_finite(fmt.decode(*fmt.unpack(named, shape))):
        return [f"{tensor['key']}: decodes to NaN or Inf"]
    return []
