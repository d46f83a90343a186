"""llmquant: weight-only quantization of large language models.

Importing it makes `transformers` load the folders that it writes. transformers itself is not imported for that, nor
torch: the loader is registered the moment transformers' own quantizers are imported, whichever import comes first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmquant.errors import LlmquantError
from llmquant.version import __version__

if TYPE_CHECKING:
    from llmquant import adapters, formats, metrics
    from llmquant.api import convert, evaluate, export, quantize
    from llmquant.hf import explain, load
    from llmquant.hub import push
    from llmquant.job import Budget
    from llmquant.recipe import Recipe, Rule

__all__ = [
    "Budget",
    "LlmquantError",
    "Recipe",
    "Rule",
    "__version__",
    "adapters",
    "convert",
    "evaluate",
    "explain",
    "export",
    "formats",
    "load",
    "metrics",
    "push",
    "quantize",
]

# Public name -> the module that has it, imported when the name is first used.
_WHERE = {
    **dict.fromkeys(("explain", "load"), "llmquant.hf"),
    **dict.fromkeys(("convert", "evaluate", "export", "quantize"), "llmquant.api"),
    **dict.fromkeys(("Recipe", "Rule"), "llmquant.recipe"),
    "push": "llmquant.hub",
    "Budget": "llmquant.job",
}
_MODULES = ("adapters", "formats", "metrics")
_HOOK = "llmquant.hf"  # registers itself
_QUANTIZERS = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"llmquant.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Finds transformers' quantizers as Python would, and registers ours as soon as they are there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _QUANTIZERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_HOOK)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    importlib.import_module(_HOOK)
else:
    sys.meta_path.insert(0, _RegisterOnImport())
