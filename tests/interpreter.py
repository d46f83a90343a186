"""Triton's interpreter: tests in a process of their own, where it is taught to round.

It computes on the bits of bfloat16 as if they were integers, and is chosen when triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter


def everywhere(test: Any) -> Any:
    """Mark a test that runs in the interpreter only."""
    for mark in (pytest.mark.interpreted, pytest.mark.skipif(not INTERPRETED, reason="in a process of their own")):
        test = mark(test)
    return test


def run_marked(file: str) -> None:
    """The tests of a file that are marked so, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr[-5000:]


def hurry() -> None:
    """Without its check of every integer operation for overflow."""
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def repair_bfloat16() -> None:
    """Upcast to float32, compute, round to the nearest even, as a GPU does. For triton 3.6 to 3.9."""
    builder = interpreter.InterpreterBuilder
    binary, dot, cast = builder.binary_op, builder.create_dot, builder.cast_impl
    arithmetic = (np.add, np.subtract, np.multiply, np.divide, np.fmod, np.minimum, np.maximum)

    def to(handle: Any, dtype: Any) -> Any:
        return builder.cast_impl(interpreter.interpreter_builder, handle, dtype)

    def wide(handle: Any) -> Any:
        return to(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        found = binary(self, wide(left), wide(right), op)
        return to(found, tl.bfloat16) if op in arithmetic else found

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            bits = np.asarray(source.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return interpreter.TensorHandle(rounded.astype(np.uint16), target.scalar)
        kinds = (tl.bfloat16, tl.float32)
        if (target.scalar == tl.bfloat16) != (source.dtype.scalar == tl.bfloat16):
            other = source.dtype.scalar if target.scalar == tl.bfloat16 else target.scalar
            if other not in kinds:
                source = cast(self, source, tl.float32) if source.dtype.scalar not in kinds else wide(source)
                return cast_impl(self, source, target)
        return cast(self, source, target)

    builder.binary_op, builder.cast_impl = binary_op, cast_impl
    builder.create_dot = lambda self, a, b, d, *rest: dot(self, wide(a), wide(b), d, *rest)
    if hasattr(interpreter, "_patch_lang_tensor"):  # 3.6: numpy 2.4 makes no number of an array of one
        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, *rest: Any) -> None:
            patch(tensor, *rest)
            tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
            tensor.__bool__ = lambda self: bool(np.asarray(self.handle.data).reshape(-1)[0])

        interpreter._patch_lang_tensor = patched
    if not hasattr(builder, "get_bf16"):  # 3.6: no constants
        builder.get_bf16 = lambda self, value: cast_impl(
            self, interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.bfloat16
        )
