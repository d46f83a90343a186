"""Packages that only some tasks need, imported when they are."""

from __future__ import annotations

import importlib
from typing import Any

from llmquant.errors import PlanError

# Package -> the extra of llmquant that brings it.
EXTRAS = {
    "compressed_tensors": "compressed-tensors",
    "gguf": "gguf",
    "peft": "peft",
    "matplotlib": "plot",
    "lm_eval": "lm-eval",
}


def extra(module: str) -> Any:
    """The module. Raises PlanError with the command that installs it."""
    package = module.split(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise PlanError(f"{package} is not installed: pip install 'llmquant[{EXTRAS[package]}]'") from None
