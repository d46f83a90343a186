"""The loop over the codes of a weight, compiled for one format, kept on disk and called by its address."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from numba import cfunc, types
from numba.extending import intrinsic

from llmquant.cpu.codes import Given, Loop
from llmquant.cpu.pairs import in_pairs
from llmquant.cpu.singles import in_singles
from llmquant.cpu.vectors import INT64, load, long


def kept_on_disk(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """The function as numba's compiler makes it, once for all processes where there is a place for it."""
    try:
        return compiler(cache=True)(function)
    except RuntimeError:
        return compiler()(function)


@cache
def version() -> str:
    """Of the code that writes code: numba looks at the file of what it compiles alone."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def loop(kind: Loop) -> Any:
    """A function that `call` can call by its `address`, as long as it is held."""
    text = " ".join([*(str(int(number)) for number in kind), version()])

    def run(at):  # type: ignore[no-untyped-def]
        _run_over_codes(text, at)

    # numba keeps an index for each name. Two processes that write into one may give a loop the code of another.
    run.__qualname__ = "_".join(["run", *text.split()[:-1]])
    return kept_on_disk(partial(cfunc, types.void(types.intp)), run)


@intrinsic(prefer_literal=True)
def _run_over_codes(context, text, at):  # type: ignore[no-untyped-def]
    """text: a Loop, and the version; at: where a Given lies."""
    kind = Loop._make(int(number) for number in text.literal_value.split()[:-1])

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        given = Given(*(load(b, args[1], INT64, long(8 * i)) for i in range(len(Given._fields))))
        (in_pairs if kind.pairs else in_singles)(b, kind, given)
        return context.get_dummy_value()

    return types.void(text, types.intp), generate
