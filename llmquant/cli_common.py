"""What all commands share: options, consoles, the progress bar and how figures are printed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmquant.card import size as size
from llmquant.errors import PlanError

out = Console()
notes = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A folder with config.json and safetensors, or a hub id.")]
FolderArgument = Annotated[Path, typer.Argument(help="A folder that quantize wrote.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's own Python code run.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same machine: same bytes.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [cuda where there is one].")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens a window [512, or the model's limit].")]
WindowOption = Annotated[int | None, typer.Option(help="Tokens a window [2048, or the model's limit].")]
MaxWindowsOption = Annotated[int | None, typer.Option(help="Measure on the first windows only.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result or cut run.")]
TextOption = Annotated[
    str, typer.Option(help="Text to measure on: a text, JSON, JSONL or parquet file, or a dataset id.")
]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A bar with the time left, as a callback (what, done, total); a new total begins a new bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, disable=quiet) as bar:
        tasks: dict[int, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if total not in tasks:
                tasks[total] = bar.add_task(what, total=total)
            bar.update(tasks[total], description=what, completed=done)

        yield report


def speaks(failure: str | None = None) -> bool:
    """Whether this process talks to the user, where torchrun has started several: the first, or of a failure one."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from llmquant import ranks

    return os.environ.get("RANK", "0") == "0" if failure is None else ranks.speaks(failure)


def dtype_named(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return None
    if name not in known:
        raise PlanError(f"dtype {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]


def print_lines(lines: list[str]) -> None:
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def bytes_named(size: str | None, option: str = "--max-memory") -> int | None:
    """A number of bytes, with a unit or without. Raises PlanError."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", size.strip(), re.ASCII)
    if found is None or len(size) > 20:
        raise PlanError(f"{option} {size!r}: give bytes, as 4GiB, 500MB or 4000000000")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))
