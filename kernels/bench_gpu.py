"""What `bench.py --session`, `--suite` and `--tune` do on a GPU: check every product, then time it beside others.

A case is a kind of numbers, a shape (out, in) and a number of rows of activations. Its time is that of one product in
a CUDA graph of as many different weights as fill the second-level cache three times, so every weight comes from
memory. Its share is that of the bandwidth at which this GPU copies: bytes of the weight, of x and of y over the time.

The session is all that a GPU is wanted for, most important first, until its minutes are over: every record is written
when it is made, so what was cut off is what is missing.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

import bench_rivals
import llmquant_kernels
from llmquant_kernels.measure import copy_bandwidth, graph_seconds
from llmquant_kernels.triton_layout import Spec, tensors_of
from llmquant_kernels.triton_settings import BUCKETS, TUNED, Device, Settings, heuristic, key, legal, slug

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (4304, 4304))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
RESULTS = Path(__file__).with_name("results")
PATIENCE = 40.0  # seconds that a session gives each of the other kernels in all: some tune at each new shape


class Case(NamedTuple):
    kind: str
    shape: tuple[int, int]  # (out, in)
    rows: int


def cases(args: Namespace) -> list[Case]:
    import bench

    kinds = args.kinds or ["all"]
    names = [*bench.KINDS] if "all" in kinds else kinds
    rows = [bucket for bucket in BUCKETS if bucket <= 256] if args.tune else ROWS
    return [Case(*case) for case in itertools.product(names, SHAPES, rows)]


def session_cases() -> list[Case]:
    """Most wanted first: int4 at the shapes of the targets, then each family of numbers, then the other shapes."""
    first = [Case("int4", shape, m) for shape in SHAPES[:2] for m in (1, 16, 64)]
    families = ("mxfp4", "nvfp4", "nf4", "kmeans4", "int3", "int2", "int8", "mxfp8_e4m3", "mx6", "ternary")
    first += [Case(kind, SHAPES[1], m) for kind in families for m in (1, 16)]
    first += [Case("int4", shape, m) for shape in SHAPES[2:] for m in (1, 16, 64, 256, 2048)]
    first += [Case("int4", shape, m) for shape in SHAPES[:2] for m in (2, 4, 8, 32, 128, 256, 2048)]
    return sorted(
        first, key=lambda case: first.index(Case(case.kind, case.shape, 1))
    )  # a shape's weights are made once


class Journal:
    """The file of a run, written anew with every record."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        path.parent.mkdir(parents=True, exist_ok=True)

    def note(self, part: str, record: Any) -> None:
        """Add to a list, and to the disk."""
        self.content.setdefault(part, []).append(record)
        self.write()

    def write(self) -> None:
        partial_path = self.path.with_suffix(".partial")
        partial_path.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial_path, self.path)


def run(args: Namespace) -> None:
    """Measure all cases and write them; or say which there are."""
    plan = session_cases() if args.session else cases(args)
    if args.dry_run:
        dry_run(args, plan)
        return
    if not torch.cuda.is_available():
        raise SystemExit("--session, --suite and --tune need a GPU; --dry-run says what they would do")
    deadline = time.monotonic() + 60 * args.minutes if args.session else math.inf
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    name = slug(torch.cuda.get_device_name())
    default = TUNED / f"{name}.json" if args.tune else RESULTS / f"{name}-{datetime.date.today()}.json"
    journal = Journal(args.output or default, {**circumstances(), "copy_bytes_per_second": bandwidth})
    if args.session:
        session(args, plan, journal, bandwidth, deadline)
    else:
        for record in records_of(args, plan, bandwidth, deadline):
            if args.tune:
                journal.content.setdefault("settings", {})[record["key"]] = record["settings"]
            journal.note("records", record)
    if not args.tune:
        print(table(journal.content.get("records", [])))
        plot(journal.content.get("records", []), journal.path.with_suffix(".svg"))
    print(f"written: {journal.path}")


def records_of(args: Namespace, plan: Sequence[Case], bandwidth: float, deadline: float) -> Iterator[dict[str, Any]]:
    """One for each case until the deadline; what raises is a record too."""
    for (kind, shape), group in itertools.groupby(plan, lambda case: case[:2]):
        if time.monotonic() > deadline:
            return
        subject = Subject(args, kind, shape)
        for case in group:
            if time.monotonic() > deadline:
                return
            try:
                if args.tune:
                    record = tune(subject, case)
                else:
                    record = measure(subject, case, bandwidth, PATIENCE if args.session else math.inf)
                print(line(record), flush=True)
            except Exception as error:  # the next case may do
                record = {**case._asdict(), "failed": f"{type(error).__name__}: {error}"[:500]}
                print(record, flush=True)
            yield record
        del subject
        torch.cuda.empty_cache()


def session(args: Namespace, plan: Sequence[Case], journal: Journal, bandwidth: float, deadline: float) -> None:
    """A third of the time for kernels beside others, then the experiment, the model, and the rest of the kernels."""
    start = time.monotonic()
    records = records_of(args, plan, bandwidth, deadline)
    for record in records:
        journal.note("records", record)
        if time.monotonic() - start > (deadline - start) / 3:
            break
    for record in first_experiment(args, bandwidth):
        journal.note("experiment", record)
    # A model in a process of its own, so that no more than its time is lost.
    script = Path(__file__).parents[1] / "eval" / "decode_speed.py"
    left = max(60.0, (deadline - time.monotonic()) * 2 / 3)
    command = [sys.executable, str(script), "--runs", "3", "--new-tokens", "64", "--quantize-blocks", "2"]
    torch.cuda.empty_cache()
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=left)
        print(found.stdout, flush=True)
        said = [text for text in found.stdout.splitlines() if text.startswith("{")]
        journal.note("model", [json.loads(text) for text in said] or {"failed": found.stderr[-2000:]})
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        journal.note("model", {"failed": f"cut off after {left:.0f} s", "said": out[-4000:]})
    for record in records:
        journal.note("records", record)


def dry_run(args: Namespace, plan: Sequence[Case]) -> None:
    """What would be measured, and which of the others are there."""
    for (kind, shape), group in itertools.groupby(plan, lambda case: case[:2]):
        print(f"{kind} {shape[0]}x{shape[1]}, rows " + " ".join(str(case.rows) for case in group))
    if args.session:
        for m, name, settings, decode in variants(Spec.of(DRY_SPEC), Device()):
            print(f"experiment, rows {m}: {name}, {settings}, {decode}")
        print("model: eval/decode_speed.py, in a process of its own")
    if not args.tune:
        print("beside: " + ", ".join(f"{name} {found}" for name, found in bench_rivals.versions().items()))
    print(f"{len(plan)} cases")


DRY_SPEC = "14336|4096|128|128|int4|bf16|2|8.0|0"


def variants(spec: Spec, device: Device) -> Iterator[tuple[int, str, Settings, str]]:
    """(rows, name, settings, decoding) of the first experiment: decoding by assembly or plainly, scales before or after
    the product, the tile, and the product by weights decoded to memory. Each pair differs in one thing."""
    tiles = {
        1: [("gemv", 8, 16, 4), ("gemv", 8, 16, 8), ("gemv", 8, 32, 4), ("gemm", 16, 64, 4)],
        16: [("gemv", 16, 32, 8), ("gemm", 16, 64, 4), ("gemm", 16, 128, 4), ("gemm", 16, 256, 8)],
        64: [("gemm", 64, 128, 8), ("gemm", 64, 256, 8)],
    }
    for m, kinds in tiles.items():
        yield m, "dense", Settings("dense"), "memory"
        for kernel, bm, bn, warps in kinds:
            count = -(-spec.rows // bn) * -(-m // bm)
            split = max(1, min(spec.steps // 2, -(-2 * device.processors // count))) if kernel == "gemm" else 1
            for scaled in (False, True) if kernel == "gemm" else (False,):
                settings = legal(Settings(kernel, bm, bn, split, warps, 3, scaled), spec, device)
                yield m, f"{kernel} {bn}x{bm} w{warps}{' scaled' * scaled}", settings, "assembly"
            yield (
                m,
                f"{kernel} {bn}x{bm} w{warps}",
                legal(Settings(kernel, bm, bn, split, warps), spec, device),
                "plain",
            )


def first_experiment(args: Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """How int4 is best decoded and multiplied, 14336x4096: the times of all variants that give the right result.

    First of all it says whether assembly and its plain twin agree in every bit: the decoding rests on a multiplication
    of bfloat16 numbers that keeps subnormal ones.
    """
    from llmquant_kernels import triton_ops

    subject = Subject(args, "int4", SHAPES[1])
    decoded = subject.prepared[0].decode()
    with patch.object(triton_ops, "_interpreted", lambda: True):
        yield {"name": "assembly is its twin", "equal": bool(torch.equal(decoded, subject.prepared[0].decode()))}
    for m, name, settings, decoding in variants(subject.spec, triton_ops.device_of(torch.device(subject.device))):
        x = subject.activations(m)
        record: dict[str, Any] = {"rows": m, "name": name, "decoding": decoding, "settings": settings._asdict()}
        with patch.object(triton_ops, "_interpreted", lambda plain=decoding == "plain": plain):
            try:
                record["error"] = check(subject, x, settings)
                seconds = graph_seconds(launches(subject, x, settings))
                record |= {"microseconds": 1e6 * seconds, "bandwidth": subject.weight_bytes / seconds / bandwidth}
            except Exception as error:
                record["failed"] = f"{type(error).__name__}: {error}"[:500]
        print(record, flush=True)
        yield record


class Subject:
    """Weights of one kind and shape, as many as no cache holds, and what they stand for."""

    def __init__(self, args: Namespace, kind: str, shape: tuple[int, int]) -> None:
        import bench

        self.dtype = getattr(torch, args.dtype)
        asked = Namespace(shape=shape, bits=4, group=128, device=args.device, kinds=[kind])
        generator = torch.Generator().manual_seed(0)
        first = bench.random_weight(asked, kind, generator)
        self.group, self.device = first.group, args.device
        self.exact = llmquant_kernels.decode(first, torch.float32)
        prepared: Any = llmquant_kernels.prepare(first, dtype=self.dtype)
        self.spec, self.weight_bytes = Spec.of(prepared.spec), prepared.nbytes
        self.prepared = [prepared]
        for _ in range(copies(prepared.nbytes, args.device) - 1):
            again = bench.random_weight(asked, kind, generator)
            self.prepared.append(llmquant_kernels.prepare(again, dtype=self.dtype))

    def activations(self, rows: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.spec.columns, generator=generator).to(self.device, self.dtype)


def copies(size: int, device: str) -> int:
    """Weights of so many bytes that fill the second-level cache three times."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device != "cpu" else 0
    return max(2, math.ceil(3 * cache / size))


def launches(subject: Subject, x: Tensor, settings: Settings) -> list[Callable[[], Tensor]]:
    """The product of x with each copy of the weight."""
    from llmquant_kernels import triton_ops

    return [partial(triton_ops.launch, x, tensors_of(own), None, subject.spec, settings) for own in subject.prepared]


def error_of(y: Tensor, x: Tensor, exact: Tensor) -> float:
    """Relative to the product in float64; infinite where anything is not a number."""
    reference = x.double() @ exact.double().t()
    error = float((y.double() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf


def check(subject: Subject, x: Tensor, settings: Settings) -> float:
    """The error of a product written over NaN. Raises ValueError where it is twice that of dense weights."""
    from llmquant_kernels import triton_ops

    out = torch.full((len(x), subject.spec.rows), torch.nan, dtype=x.dtype, device=x.device)
    triton_ops.launch(x, tensors_of(subject.prepared[0]), None, subject.spec, settings, out)
    error = error_of(out, x, subject.exact)
    dense = error_of(functional.linear(x, subject.exact.to(x.dtype)), x, subject.exact)
    if error > 2 * dense + 1e-6:
        raise ValueError(f"{subject.spec.text}, {len(x)} rows, {settings}: error {error:.2e}, dense {dense:.2e}")
    return error


def measure(subject: Subject, case: Case, bandwidth: float, patience: float = math.inf) -> dict[str, Any]:
    x = subject.activations(case.rows)
    settings = settings_here(subject, case.rows)
    error = check(subject, x, settings)
    seconds = graph_seconds([partial(llmquant_kernels.linear, x, own) for own in subject.prepared])
    moved = subject.weight_bytes + x.element_size() * (x.numel() + case.rows * case.shape[0])
    others, errors = beside(case, x, subject.device, patience)
    return {
        **case._asdict(),
        "microseconds": 1e6 * seconds,
        "bytes": moved,
        "share": moved / seconds / bandwidth,
        "error": error,
        "settings": settings._asdict(),
        "others": others,
        "errors_of_others": errors,
    }


SPENT: dict[str, float] = {}  # seconds, on each of the others


def beside(case: Case, x: Tensor, device: str, patience: float) -> tuple[dict[str, Any], dict[str, float]]:
    """({rival: microseconds, or why there are none}, {rival: error of its result against float64})."""
    size = case.shape[0] * case.shape[1]
    task = bench_rivals.Task(case.kind, case.shape, copies(size // 2, device), copies(size * x.element_size(), device))
    times: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for name, make in bench_rivals.ADAPTERS.items():
        start = time.monotonic()
        try:
            if SPENT.get(name, 0.0) > patience:
                raise bench_rivals.Skipped(f"took its {patience:.0f} s")
            calls, exact = make(task, x)
            errors[name] = error_of(calls[0](), x, exact)
            times[name] = 1e6 * graph_seconds(calls)
        except bench_rivals.Skipped as reason:
            times[name] = f"skipped: {reason}"
        except Exception as error:  # what others refuse is a result too
            times[name] = f"{type(error).__name__}: {error}"[:200]
        SPENT[name] = SPENT.get(name, 0.0) + time.monotonic() - start
    return times, errors


def settings_here(subject: Subject, rows: int) -> Settings:
    from llmquant_kernels import triton_ops
    from llmquant_kernels.triton_settings import settings_for

    return settings_for(rows, subject.spec, triton_ops.device_of(torch.device(subject.device)))


def candidates(rows: int, spec: Spec, device: Device) -> Iterator[Settings]:
    """Settings worth timing, the heuristic's first, each once."""
    found = {legal(heuristic(rows, spec, device), spec, device): None}
    for bm in (8, 16, 32):
        if rows <= bm and (bm == 8 or bm < 2 * rows):
            for strips, warps, stages in itertools.product((1, 2, 4), (4, 8), (2, 3, 4)):
                found[legal(Settings("gemv", bm, 16 * strips, 1, warps, stages), spec, device)] = None
    bm = min(128, max(16, 2 ** math.ceil(math.log2(rows))))
    for bn, split, warps, stages, scaled in itertools.product(
        (64, 128, 256), (1, 2, 4, 8, 16), (4, 8), (2, 3, 4), (False, True)
    ):
        if split <= spec.steps:
            found[legal(Settings("gemm", bm, bn, split, warps, stages, scaled), spec, device)] = None
    yield from found


def tune(subject: Subject, case: Case) -> dict[str, Any]:
    """The fastest candidate of those that give the right result."""
    from llmquant_kernels import triton_ops

    x = subject.activations(case.rows)
    device = triton_ops.device_of(torch.device(subject.device))
    times: dict[Settings, float] = {}
    for settings in candidates(case.rows, subject.spec, device):
        try:
            check(subject, x, settings)
        except Exception as refused:  # too many registers, say: the next one
            print(f"  {settings}: {str(refused)[:100]}", flush=True)
            continue
        times[settings] = graph_seconds(launches(subject, x, settings))
    if not times:
        raise RuntimeError(f"no settings work for {case}")
    best = min(times, key=lambda settings: times[settings])
    return {
        **case._asdict(),
        "key": key(case.rows, subject.spec),
        "settings": best._asdict(),
        "microseconds": 1e6 * times[best],
        "heuristic_microseconds": 1e6 * next(iter(times.values())),
    }


# ---- what is written


def circumstances() -> dict[str, Any]:
    import triton

    folder = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=folder).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "others": bench_rivals.versions(),
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def line(record: dict[str, Any]) -> str:
    """One case."""
    out, columns = record["shape"]
    text = f"{record['kind']:10} {out}x{columns} rows {record['rows']:4}: {record['microseconds']:8.1f} us"
    if "share" in record:
        text += f", {100 * record['share']:3.0f} % of the bandwidth, error {record['error']:.1e}"
    for name, value in record.get("others", {}).items():
        if isinstance(value, float):
            text += f", {name} {value / record['microseconds']:.2f}x"
    return text


def table(records: list[dict[str, Any]], rival: str = "cublas") -> str:
    """Speed-up over `rival` by rows, a line for each kind and shape; "-" where it was not measured."""
    records = [record for record in records if "failed" not in record]
    rows = sorted({record["rows"] for record in records})
    lines = [f"| speed-up over {rival} | " + " | ".join(str(m) for m in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for kind, shape in dict.fromkeys((record["kind"], tuple(record["shape"])) for record in records):
        cells = []
        for m in rows:
            own = [r for r in records if (r["kind"], tuple(r["shape"]), r["rows"]) == (kind, shape, m)]
            other = own[0]["others"].get(rival) if own else None
            cells.append(f"{other / own[0]['microseconds']:.2f}" if isinstance(other, float) else "-")
        lines.append(f"| {kind} {shape[0]}x{shape[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Share of the bandwidth against rows of x, a line for each kind and shape. Needs matplotlib."""
    records = [record for record in records if "failed" not in record]
    if find_spec("matplotlib") is None or not records:
        print("no picture: " + ("nothing was measured" if not records else "matplotlib is not installed"))
        return
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(9, 6))
    for kind, shape in dict.fromkeys((record["kind"], tuple(record["shape"])) for record in records):
        own = sorted(
            (record["rows"], 100 * record["share"])
            for record in records
            if (record["kind"], tuple(record["shape"])) == (kind, shape)
        )
        axes.plot([m for m, _ in own], [share for _, share in own], marker="o", label=f"{kind} {shape[0]}x{shape[1]}")
    axes.set(xscale="log", xlabel="rows of activations", ylabel="share of the bandwidth of a copy, %")
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
