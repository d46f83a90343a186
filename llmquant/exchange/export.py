"""Export: a finished folder in the files of another tool, checked by that tool's own reader before it has its name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from llmquant.errors import PlanError
from llmquant.exchange import compressed_tensors, dense, gguf, gptq
from llmquant.exchange.model import Model, Progress
from llmquant.output import OutputFolder, check_usable
from llmquant.version import __version__

# Each has check(model), which refuses by name what the target cannot express and returns notes for the user, and
# write(model, folder, progress), which writes and verifies all files but config.json, and returns that, or
# None where the files need none, nor those of the tokenizer.
TARGETS: dict[str, ModuleType] = {"compressed-tensors": compressed_tensors, "gptq": gptq, "gguf": gguf, "dense": dense}


def target_named(to: str) -> ModuleType:
    if to not in TARGETS:
        raise PlanError(f"export target {to!r} is unknown: choose one of {', '.join(TARGETS)}")
    return TARGETS[to]


def check(model: Model, to: str) -> list[str]:
    """Notes for the user. Raises PlanError, naming the tensor, for what the target cannot express."""
    target = target_named(to)
    for matrix in () if target is dense else model.matrices:
        if matrix.target.expert is not None:
            raise PlanError(
                f"{matrix.target.name}: is one of many experts that the model holds as one tensor, and {to} is written "
                "of linear layers: keep them dense with --skip"
            )
        if isinstance(model.skeleton.get_submodule(matrix.target.name), nn.Embedding):
            raise PlanError(
                f"{matrix.target.name}: is an embedding, and {to} is written of linear layers: keep it dense"
            )
    return list(target.check(model))


def export(
    source: Path,
    output: Path,
    to: str,
    *,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[str]:
    """Write the model in `source`, a finished folder, to `output` in the files of `to`. Returns notes for the user.

    A run that was cut is taken up again by the same call. Raises the LlmquantError that says what is wrong.
    """
    check_usable(output, overwrite=overwrite)
    model = Model.open(source)
    notes = check(model, to)
    settings = {"llmquant": __version__, "export": to, "source": model.checkpoint.fingerprint()}
    with OutputFolder(output, settings, overwrite=overwrite) as folder:
        config = target_named(to).write(model, folder, progress)
        companions = [] if config is None else model.checkpoint.companions()
        folder.assemble(config, companions)
        folder.finish(_manifest(model, to))
    return notes


def _manifest(model: Model, to: str) -> dict[str, Any]:
    """That of the source; its tensors too where the files still hold them."""
    facts = {key: value for key, value in model.facts.items() if key != "files"}
    kept = facts["tensors"] if to == "compressed-tensors" else []
    return {**facts, "export": {"to": to, "matrices": len(model.matrices)}, "tensors": kept}
