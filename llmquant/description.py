"""What a finished folder says of itself: README.md, report.html, and what was measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant import card, inspection, report
from llmquant.checkpoint import MANIFEST, sha256
from llmquant.output import replace_text


def describe(folder: Path, evaluation: dict[str, Any] | None = None) -> None:
    """Write model card and report of a folder that a run has finished, and note them in its manifest.

    evaluation: figures of the model, which the manifest keeps and both show.
    """
    facts = inspection.manifest(folder)
    if evaluation is not None:
        facts["evaluation"] = evaluation
    texts = {"README.md": card.text(facts), "report.html": report.page(facts)}
    for name, text in texts.items():
        replace_text(folder / name, text)
        facts["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    facts["files"] = dict(sorted(facts["files"].items()))
    replace_text(folder / MANIFEST, json.dumps(facts, indent=2) + "\n")
