"""Several models beside each other: what they take, what they lost, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmquant import charts, generation, metrics, report
from llmquant.card import size

Load = Callable[[str], PreTrainedModel]


@dataclass(frozen=True)
class Entry:
    """A model's figures. bits_per_weight: of quantized weights, None for a dense model; kl: None for the reference."""

    name: str
    bits_per_weight: float | None
    bits_per_parameter: float
    file_bytes: int
    perplexity: float
    kl: float | None
    kl_standard_error: float | None
    top1_agreement: float | None
    writes: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    folders: dict[str, Path],
    reference: str,
    load: Load,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    vocabulary: int,
    *,
    prompt: str,
    max_new_tokens: int = 60,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Entry]:
    """The reference first. folders: {name: folder}, the reference among them; load(name) gives a model to be run.

    Two models are in memory at a time. Raises what metrics and generation raise.
    """
    original = load(reference)
    found = []
    for place, (name, folder) in enumerate(sorted(folders.items(), key=lambda item: item[0] != reference)):
        progress(name, place, len(folders))
        model = original if name == reference else load(name)
        if name == reference:
            own, apart = metrics.perplexity(original, windows, vocabulary=vocabulary), None
        else:
            apart = metrics.divergence(original, model, windows, vocabulary=vocabulary)
            own = apart.model
        stored = metrics.stored_size(folder)
        entry = Entry(
            name=name,
            bits_per_weight=stored.bits_per_weight,
            bits_per_parameter=stored.bits_per_parameter,
            file_bytes=stored.file_bytes,
            perplexity=own.perplexity,
            kl=None if apart is None else apart.mean,
            kl_standard_error=None if apart is None else apart.standard_error,
            top1_agreement=None if apart is None else apart.top1_agreement,
            writes=generation.stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens).text,
        )
        found.append(entry)
        del model
    return found


def best(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of those (bits, lost) than which no other has both fewer bits and less lost, by bits."""
    order = sorted(range(len(points)), key=lambda place: points[place])
    found: list[int] = []
    for place in order:
        if not found or points[place][1] < points[found[-1]][1]:
            found.append(place)
    return found


def page(entries: Sequence[Entry], prompt: str, tokens: int) -> str:
    """HTML that needs nothing else. tokens: how many were predicted."""
    reference, *others = entries
    rows = [
        [
            entry.name,
            "dense" if entry.bits_per_weight is None else round(entry.bits_per_weight, 3),
            round(entry.bits_per_parameter, 3),
            size(entry.file_bytes),
            entry.perplexity,
            "-" if entry.kl is None else entry.kl,
            "-" if entry.kl_standard_error is None else entry.kl_standard_error,
            "-" if entry.top1_agreement is None else f"{100 * entry.top1_agreement:.1f} %",
        ]
        for entry in entries
    ]
    headers = ["model", "bits a weight", "bits a parameter", "files", "perplexity", "KL", "± KL", "same top token"]
    written = "".join(
        f"<figure><figcaption>{escape(entry.name)}</figcaption><pre class='text'>{escape(entry.writes)}</pre></figure>"
        for entry in entries
    )
    parts = [
        f"<h1>{len(others)} models beside {escape(reference.name)}</h1>",
        f"<p>On {tokens:,} tokens. KL: how far the predictions moved from those of {escape(reference.name)}, nats a "
        "token.</p>",
        report.table(headers, rows),
        "<h2>What is lost for what size</h2>",
        report.drawn(lambda: list(_fronts(others))),
        f"<h2>What they write</h2><pre class='text'>{escape(prompt)}</pre><div class='charts'>{written}</div>",
    ]
    return report.document(f"beside {reference.name}", parts)


def _fronts(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Pictures of KL and of perplexity against bits; a dense model has those of its type."""
    found = []
    for label, lost in (("KL, nats a token", lambda entry: entry.kl), ("perplexity", lambda entry: entry.perplexity)):
        points = [(e.name, e.bits_per_weight or e.bits_per_parameter, lost(e)) for e in entries if lost(e)]
        if points:
            places = best([point[1:] for point in points])
            found.append((label, charts.front(label, points, places, label)))
    return found


def token_count(windows: Tensor) -> int:
    """How many of the tokens of (windows, length) are predicted."""
    return int(torch.numel(windows[:, 1:]))
