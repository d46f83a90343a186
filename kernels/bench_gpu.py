"""What `bench.py --suite` and `--tune` do on a GPU: check every product, then time it beside others.

A case is a kind of numbers, a shape (out, in) and a number of rows of activations. Its time is that of one product in
a CUDA graph of as many different weights as fill the second-level cache three times, so every weight comes from
memory. Its share is that of the bandwidth at which this GPU copies: bytes of the weight, of x and of y over the time.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import llmquant_kernels
from llmquant_kernels.triton_layout import Spec
from llmquant_kernels.triton_settings import BUCKETS, TUNED, Device, Settings, heuristic, key, legal, slug

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (4304, 4304))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
RESULTS = Path(__file__).with_name("results")


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


def run(args: Namespace) -> None:
    """Measure all cases and write them; or say which there are."""
    plan = cases(args)
    if args.dry_run:
        for (kind, shape), group in itertools.groupby(plan, lambda case: case[:2]):
            print(f"{kind} {shape[0]}x{shape[1]}, rows " + " ".join(str(case.rows) for case in group))
        print(f"{len(plan)} cases")
        return
    if not torch.cuda.is_available():
        raise SystemExit("--suite and --tune need a GPU; --dry-run says what they would do")
    records: list[dict[str, Any]] = []
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copies at {bandwidth / 1e12:.2f} TB/s", flush=True)
    for (kind, shape), group in itertools.groupby(plan, lambda case: case[:2]):
        subject = Subject(args, kind, shape)
        for case in group:
            records.append(tune(subject, case) if args.tune else measure(subject, case, bandwidth))
            print(line(records[-1]), flush=True)
    name = slug(torch.cuda.get_device_name())
    if args.tune:
        path = args.output or TUNED / f"{name}.json"
        content = {**circumstances(), "settings": {record["key"]: record["settings"] for record in records}}
    else:
        path = args.output or RESULTS / f"{name}-{datetime.date.today()}.json"
        content = {**circumstances(), "copy_bytes_per_second": bandwidth, "records": records}
        print(table(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


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


def parts(prepared: Any) -> Any:
    names = ("low", "high", "scale", "zero", "table", "row", "offset")
    return tuple(getattr(prepared, name) for name in names)


def error_of(y: Tensor, x: Tensor, exact: Tensor) -> float:
    """Relative to the product in float64; infinite where anything is not a number."""
    reference = x.double() @ exact.double().t()
    error = float((y.double() - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf


def check(subject: Subject, x: Tensor, settings: Settings) -> float:
    """The error of a product written over NaN. Raises ValueError where it is twice that of dense weights."""
    from llmquant_kernels import triton_ops

    out = torch.full((len(x), subject.spec.rows), torch.nan, dtype=x.dtype, device=x.device)
    triton_ops.launch(x, parts(subject.prepared[0]), None, subject.spec, settings, out)
    error = error_of(out, x, subject.exact)
    dense = error_of(functional.linear(x, subject.exact.to(x.dtype)), x, subject.exact)
    if error > 2 * dense + 1e-6:
        raise ValueError(f"{subject.spec.text}, {len(x)} rows, {settings}: error {error:.2e}, dense {dense:.2e}")
    return error


def measure(subject: Subject, case: Case, bandwidth: float) -> dict[str, Any]:
    x = subject.activations(case.rows)
    settings = settings_here(subject, case.rows)
    error = check(subject, x, settings)
    seconds = graph_seconds([partial(llmquant_kernels.linear, x, own) for own in subject.prepared])
    moved = subject.weight_bytes + x.element_size() * (x.numel() + case.rows * case.shape[0])
    others: dict[str, Any] = {}
    for name, make in RIVALS.items():
        try:
            calls = make(subject, case, x)
            others[name] = None if calls is None else 1e6 * graph_seconds(calls)
        except Exception as error_there:  # what others refuse is a result too
            others[name] = f"{type(error_there).__name__}: {error_there}"[:200]
    return {
        **case._asdict(),
        "microseconds": 1e6 * seconds,
        "bytes": moved,
        "share": moved / seconds / bandwidth,
        "error": error,
        "settings": settings._asdict(),
        "others": others,
    }


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
        calls = [partial(triton_ops.launch, x, parts(own), None, subject.spec, settings) for own in subject.prepared]
        times[settings] = graph_seconds(calls)
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


def graph_seconds(calls: Sequence[Callable[[], Tensor]], least: float = 0.2) -> float:
    """Seconds of one call: the median of graph replays of all of them, for `least` seconds in all."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # for no two results to share memory
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(3):
        graph.replay()
    while sum(times) < least or len(times) < 5:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    del kept
    return sorted(times)[len(times) // 2] / len(calls)


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)])


# ---- other kernels: the calls of one graph, None where they have no such numbers

Calls = Sequence[Callable[[], Tensor]] | None


def cublas(subject: Subject, case: Case, x: Tensor) -> Calls:
    size = case.shape[0] * case.shape[1] * x.element_size()
    dense = [subject.exact.to(x.dtype).clone() for _ in range(copies(size, subject.device))]
    return [partial(functional.linear, x, w) for w in dense]


def tinygemm(subject: Subject, case: Case, x: Tensor) -> Calls:
    """torch's own int4. Random codes: only the time is wanted."""
    out, columns = case.shape
    if case.kind != "int4" or x.dtype != torch.bfloat16 or columns % 128 or out % 8:
        return None
    weights = []
    for _ in subject.prepared:
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=x.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.randn(columns // 128, out, 2, dtype=x.dtype, device=x.device)))
    return [partial(torch.ops.aten._weight_int4pack_mm, x, codes, 128, grid) for codes, grid in weights]


def bitsandbytes(subject: Subject, case: Case, x: Tensor) -> Calls:
    if case.kind != "nf4" or find_spec("bitsandbytes") is None:
        return None
    module = import_module("bitsandbytes")
    quantize = import_module("bitsandbytes.functional").quantize_4bit
    weights = []
    for _ in subject.prepared:
        w = torch.randn(case.shape, dtype=x.dtype, device=x.device)
        weights.append(quantize(w, blocksize=64, quant_type="nf4"))
    return [partial(module.matmul_4bit, x, codes.t(), quant_state=state) for codes, state in weights]


def torchao(subject: Subject, case: Case, x: Tensor) -> Calls:
    if case.kind not in ("int4", "int8") or find_spec("torchao") is None:
        return None
    module = import_module("torchao.quantization")
    config = module.Int4WeightOnlyConfig(group_size=128) if case.kind == "int4" else module.Int8WeightOnlyConfig()
    layers = []
    for _ in subject.prepared:
        layer = torch.nn.Linear(case.shape[1], case.shape[0], bias=False, dtype=x.dtype, device=x.device)
        module.quantize_(layer, config)
        layers.append(layer)
    return [partial(layer, x) for layer in layers]


RIVALS: dict[str, Callable[[Subject, Case, Tensor], Calls]] = {
    "cublas": cublas,
    "tinygemm": tinygemm,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
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
        "others": {name: module_version(name) for name in RIVALS if find_spec(name) is not None},
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def module_version(name: str) -> str:
    return str(getattr(import_module(name), "__version__", "unknown"))


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
