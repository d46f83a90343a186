"""The end of a run: what is noted of it, and its result beside the original."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file

from llmquant import domain, recovery, verification
from llmquant.checkpoint import Checkpoint
from llmquant.estimate import Row
from llmquant.job import Prepared, Progress
from llmquant.output import CALIBRATION, OutputFolder
from llmquant.verification import Verification
from llmquant.version import __version__


def compare(
    prepared: Prepared,
    folder: OutputFolder,
    manifest: dict[str, Any],
    progress: Progress,
    remedy: str = "please report it",
) -> Verification:
    """Compare what lies in the folder with the original, and note it in the manifest.

    On a few held-out windows, or on random tokens where there is no text. Raises VerificationError where the two are
    further apart than the format explains.
    """
    windows = verification.random_windows(prepared.model, seed=prepared.job.seed)
    if prepared.job.calibration is not None:
        windows = load_file(folder.partial / CALIBRATION)["tokens"][-verification.WINDOWS :, : verification.LENGTH]
    found = verification.verify(
        folder.partial,
        prepared.model,
        windows,
        manifest=manifest,
        trust_remote_code=prepared.job.trust_remote_code,
        progress=progress,
    )
    found.check(folder.partial, f"it keeps this name: {remedy}")
    manifest["verification"] = found.to_json()
    return found


def result_config(prepared: Prepared) -> dict[str, Any]:
    quantization = {"quant_method": "llmquant", "version": __version__, "formats": prepared.plan.modules()}
    return {**prepared.checkpoint.config(), "quantization_config": quantization}


def result_manifest(prepared: Prepared, folder: OutputFolder) -> dict[str, Any]:
    """All about the run that does not depend on when and where it ran."""
    plan, job = prepared.plan, prepared.job
    scaled = [note for part in sorted(folder.records) for note in folder.records[part].get("scaled", [])]
    written = [report for part in sorted(folder.records) for report in folder.records[part].get("report", [])]
    reports = list({report["name"]: report for report in written}.values())  # a block written anew counts as it is now
    versions = {
        "llmquant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
    return {
        "versions": versions,
        "model": Path(job.model).name if Path(job.model).is_dir() else job.model,
        "settings": {key: value for key, value in folder.settings.items() if key != "source"},
        "threads": torch.get_num_threads(),
        "bits_per_weight": plan.bits_per_weight,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "kept_dense": [asdict(kept) for kept in plan.kept],
        "recoveries": recovery.of_run(reports),
        **_fit(folder),
        **({} if prepared.rotation is None else {"rotation": prepared.rotation}),
        **({"experts": experts} if (experts := recovery.coverage(reports)) else {}),
        "scaled": scaled,
        "tensors": reports,
        "histograms": [_histogram(prepared, folder, row) for row in _worst(plan.rows, reports)],
    }


def _fit(folder: OutputFolder) -> dict[str, Any]:
    """How the calibration text fits the model, where it was looked at."""
    path = folder.partial / CALIBRATION
    shown = load_file(path) if path.is_file() else {}
    if "excess" not in shown:
        return {}
    facts = {"excess": float(shown["excess"]), "bound": domain.MOST}
    return {"calibration_fit": {**facts, "windows": len(shown["own"]), "own_windows": int(shown["own"].sum())}}


def _worst(rows: Iterable[Row], reports: list[dict[str, Any]]) -> list[Row]:
    """Three matrices, by the error of their outputs where that is known."""
    worst = sorted(reports, key=lambda report: -report.get("output_error", report["error"]))[:3]
    named = {row.target.name: row for row in rows}
    return [named[report["name"]] for report in worst]


def _histogram(prepared: Prepared, folder: OutputFolder, row: Row) -> dict[str, Any]:
    """Counts of a matrix's weights before and after, in 64 equal bins; before: as the checkpoint has them."""
    model, written = prepared.model, Checkpoint(folder.partial)
    after = row.format.decode(*row.unpacked(written.tensors(list(row.pieces))))
    with model.loaded(row.block):
        before = row.target.matrix(model.module(row.target)).detach().float().cpu()
    low, high = (float(end) for end in torch.aminmax(before))
    counts = [torch.histc(w.clamp(low, high), 64, low, high).int().tolist() for w in (before, after)]
    return {"name": row.target.name, "low": low, "high": high, "before": counts[0], "after": counts[1]}
