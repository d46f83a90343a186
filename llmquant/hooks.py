"""Hooks on modules, which are there for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


class SeenEnough(Exception):
    """Raised by a hook that has seen what it wanted: the rest of the forward pass need not run."""


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove the hooks at the end, which SeenEnough may bring about."""
    try:
        yield
    except SeenEnough:
        pass
    finally:
        for handle in handles:
            handle.remove()
