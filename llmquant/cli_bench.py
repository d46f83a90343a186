"""The command that measures this machine: bench."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from llmquant.cli_common import (
    DeviceOption,
    JsonOption,
    dtype_named,
    out,
)
from llmquant.errors import PlanError
from llmquant.version import __version__


def bench(
    folder: Annotated[Path | None, typer.Argument(help="A folder that quantize wrote: its first block.")] = None,
    shape: Annotated[tuple[int, int], typer.Option(help="Of a random weight instead: out and in.")] = (4096, 4096),
    format: Annotated[
        list[str] | None, typer.Option(help="Format of a random weight, as nf4:g64. Repeatable. [int4:g128]")
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows of activations: tokens that are computed together.")] = "1,8,32,128",
    device: DeviceOption = None,
    dtype: Annotated[str, typer.Option(help="Type of the activations: float32, bfloat16, float16.")] = "bfloat16",
    runs: Annotated[int, typer.Option(min=1, help="Pairs of products that a figure is the median of.")] = 9,
    keep_decoded: Annotated[bool, typer.Option("--keep-decoded", help="Hold the decoded weights, too.")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count the time of one thread, on a machine that does other work.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest settings of the kernels for this GPU.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time products by quantized weights beside dense ones: bytes moved, share of the memory's bandwidth, speed-up.

    The bandwidth is measured in the same run, by a copy.
    """
    import torch

    from llmquant import benchmark
    from llmquant_kernels.measure import copy_bandwidth

    if tune:
        _tune()
        return
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if cpu_time and place != "cpu":
        raise PlanError(f"--cpu-time on {place}: it counts the time of a CPU's thread")
    if cpu_time:
        torch.set_num_threads(1)
    if folder is not None and format:
        raise PlanError(f"--format beside {folder}: its matrices have their formats")
    clock, counts = time.thread_time if cpu_time else time.perf_counter, benchmark.numbers(rows)
    activations = dtype_named(dtype)
    options: dict[str, Any] = {"dtype": activations, "device": place, "runs": runs, "keep_decoded": keep_decoded}
    if folder is not None:
        weights = benchmark.of_block(folder)
    else:
        name = f"{shape[0]}x{shape[1]}"
        specs = format or ["int4:g128"]
        weights = iter([(name, spec, benchmark.of_shape(spec, shape, activations)) for spec in specs])
    with torch.inference_mode():
        bandwidth = copy_bandwidth(place, clock)
        found = [
            line
            for weight in weights
            for line in benchmark.lines(*weight, counts, bandwidth=bandwidth, clock=clock, **options)
        ]
    facts = {
        "device": torch.cuda.get_device_name(place) if place != "cpu" else "cpu",
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "llmquant": __version__,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "copy_bytes_per_second": bandwidth,
    }
    if as_json:
        print(json.dumps({**facts, "command": sys.argv[1:], "lines": [line.to_json() for line in found]}))
        return
    headers = ("matrix", "format", "rows", "ms", "MB", "% of the\nbandwidth", f"times\n{dtype}", "kernel")
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None)
    for line in found:
        table.add_row(
            line.name,
            line.format,
            str(line.rows),
            f"{line.milliseconds:.3f}",
            f"{line.nbytes / 1e6:.2f}",
            f"{100 * line.share:.0f}",
            f"{line.speedup:.2f}",
            line.kernel,
        )
    out.print(table)
    where = f"{facts['device']}, {facts['threads']} threads" if place == "cpu" else facts["device"]
    out.print(f"\n{where}: copies at {bandwidth / 1e9:.1f} GB/s", highlight=False, soft_wrap=True)


def _tune() -> None:
    """By the script of the repository, which times every candidate. Its settings are data of the kernels' package."""
    import torch

    import llmquant_kernels

    if not torch.cuda.is_available():
        raise PlanError("--tune needs an NVIDIA GPU, and torch sees none here: on a CPU there is nothing to tune")
    script = Path(llmquant_kernels.__file__).parents[1] / "bench.py"
    if not script.is_file():
        raise PlanError(f"--tune needs {script}, which is in a clone of the repository: pip install -e it")
    if code := subprocess.run([sys.executable, str(script), "--tune"], check=False).returncode:
        raise typer.Exit(code)
