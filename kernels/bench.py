"""Time multiplication by quantized weights side by side with torch's own by dense ones, and check both by float64.

    python kernels/bench.py --bits 4 --group 128 --shape 4096 4096 --rows 1 2 4 8 16 64 256
    python kernels/bench.py --kinds mxfp4 nvfp4 ternary --rows 1 4 16 64
    python kernels/bench.py --kinds all --rows 1 4 16 64

Several weights are used in turn (--weights), as the layers of a model are, so that no cache holds them all. Dense and
quantized runs alternate; a ratio is the median of pairs. The last line of stdout is one JSON object.

    python kernels/bench.py --suite [--dry-run]   # on a GPU: all shapes, rows and kinds, beside other kernels
    python kernels/bench.py --tune                # on a GPU: the fastest settings of each, for llmquant_kernels/tuned
    python kernels/bench.py --session [--dry-run] # on a GPU: ten minutes of what is wanted most, a whole model included

All check every product against float64 in results that were full of NaN, then time it in a CUDA graph that goes
through more weights than the second-level cache holds. They write a JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llmquant_kernels
from llmquant_kernels import PackedWeight
from llmquant_kernels.measure import measure


class Kind(NamedTuple):
    bits: int
    group: int
    scale: torch.dtype
    fields: dict[str, Any]  # further ones of PackedWeight


def _floats(exponent: int, mantissa: int) -> Tensor:
    """Values of the codes sign | exponent | mantissa, none of them special, (codes,) float32."""
    code = torch.arange(2 ** (exponent + mantissa))
    e, m = code >> mantissa, code & 2**mantissa - 1
    bias = 2 ** (exponent - 1) - 1
    size = torch.ldexp(torch.where(e == 0, m, m + 2**mantissa).float(), e.clamp_min(1) - bias - mantissa)
    return torch.cat([size, -size])


def _sign_magnitude(bits: int) -> Tensor:
    size = torch.arange(2.0 ** (bits - 1))
    return torch.cat([size, -size])


E8M0, ANY = torch.float8_e8m0fnu, 2**30
KINDS = {
    **{f"int{bits}": Kind(bits, 128, torch.bfloat16, {"zero": 2 ** (bits - 1)}) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Kind(4, 32, E8M0, {"levels": _floats(2, 1)}),
    "mxfp6_e2m3": Kind(6, 32, E8M0, {"levels": _floats(2, 3)}),
    "mxfp6_e3m2": Kind(6, 32, E8M0, {"levels": _floats(3, 2)}),
    "mxfp8_e4m3": Kind(8, 32, E8M0, {"levels": _floats(4, 3)}),
    "mxint8": Kind(8, 32, E8M0, {"signed": True, "outer": torch.full((1, 1), 1 / 64)}),
    "nvfp4": Kind(4, 16, torch.float8_e4m3fn, {"levels": _floats(2, 1)}),
    "mx9": Kind(8, 16, E8M0, {"levels": _sign_magnitude(8)}),
    "mx6": Kind(5, 16, E8M0, {"levels": _sign_magnitude(5)}),
    "mx4": Kind(3, 16, E8M0, {"levels": _sign_magnitude(3)}),
    "vsq4": Kind(4, 16, torch.uint8, {"zero": 8}),
    "vsq6": Kind(6, 16, torch.uint8, {"zero": 32}),
    "vsq8": Kind(8, 16, torch.uint8, {"zero": 128}),
    "fp8_row": Kind(8, ANY, torch.float32, {"levels": _floats(4, 3)}),
    "fp8_g128": Kind(8, 128, torch.float32, {"levels": _floats(4, 3)}),
    "nf4": Kind(4, 64, torch.float32, {"levels": torch.linspace(-1, 1, 16) ** 3}),
    "kmeans3": Kind(3, ANY, torch.float32, {}),
    "kmeans4": Kind(4, ANY, torch.float32, {}),
    "ternary": Kind(2, 128, torch.float16, {"trits": True, "zero": 1}),
    "binary": Kind(1, 128, torch.float16, {}),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=["all", *KINDS], metavar="KIND", help=f"of: all, {', '.join(KINDS)}"
    )
    parser.add_argument("--bits", type=int, default=4, help="of integers, where no kinds are given")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale; 0: one scale a row")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--weights", type=int, default=8, help="different weights used in turn")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-decoded", action="store_true", help="trade memory for speed on many rows")
    parser.add_argument("--suite", action="store_true", help="everything that is measured on a GPU")
    parser.add_argument("--tune", action="store_true", help="write the fastest settings for this GPU")
    parser.add_argument("--session", action="store_true", help="what is wanted most of a GPU, and a whole model")
    parser.add_argument("--minutes", type=float, default=9, help="that --session may take")
    parser.add_argument("--dry-run", action="store_true", help="print what --session, --suite or --tune would measure")
    parser.add_argument("--output", type=Path, help="of --session, --suite and --tune; by default named after the GPU")
    return parser.parse_args()


def random_weight(args: argparse.Namespace, name: str, generator: torch.Generator) -> PackedWeight:
    rows, columns = args.shape
    integers = Kind(args.bits, args.group or columns, torch.bfloat16, {"zero": 2 ** (args.bits - 1)})
    kind = KINDS[name] if args.kinds else integers
    fields = dict(kind.fields)
    trits, groups = "trits" in fields, -(-columns // kind.group)

    def bytes_of(size: int, top: int = 256) -> Tensor:
        return torch.randint(0, top, (rows, size), generator=generator).to(torch.uint8)

    fields["packed"] = bytes_of(-(-columns // 5), 243) if trits else bytes_of(4 * -(-columns * kind.bits // 32))
    scale = (0.5 + torch.rand(rows, groups, generator=generator)) / 2**kind.bits / columns**0.5
    if kind.scale in (torch.uint8, torch.float8_e4m3fn):
        fields["outer"] = scale.amax(1, keepdim=True) / 100
        scale = scale / fields["outer"]
    fields["scale"] = scale.to(kind.scale)
    if name == "binary":
        fields["offset"] = -fields["scale"] / 2
    if name in ("mx9", "mx6", "mx4"):
        fields["micro"] = bytes_of(groups)
    if name.startswith("kmeans"):
        fields["levels"] = torch.randn(rows, 2**kind.bits, generator=generator).half()
    fields = {field: value.to(args.device) if isinstance(value, Tensor) else value for field, value in fields.items()}
    return PackedWeight(bits=kind.bits, shape=(rows, columns), group=kind.group, **fields)


def measure_kind(kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All numbers of rows."""
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    weights = [random_weight(args, kind, generator) for _ in range(args.weights)]
    dense = [llmquant_kernels.decode(weight, dtype) for weight in weights]
    prepared = [llmquant_kernels.prepare(weight, dtype=dtype, keep_decoded=args.keep_decoded) for weight in weights]
    exact = llmquant_kernels.decode(weights[0], torch.float32).double()
    print(f"\n{kind}, {llmquant_kernels.explain(weights[0], dtype)}")
    print(f"{'rows':>5} {'dense ms':>9} {'quantized ms':>13} {'speedup':>8} {'error, dense':>13} {'quantized':>10}")
    results = []
    for rows in args.rows:
        x = torch.randn(rows, args.shape[1], generator=generator).to(args.device, dtype)
        found = measure(x, exact, dense, prepared, args.runs)._asdict()
        results.append({"kind": kind, "backend": prepared[0].name, **found})
        print(
            f"{rows:5} {found['dense_ms']:9.3f} {found['quantized_ms']:13.3f} {found['speedup']:8.2f} "
            f"{found['dense_error']:13.5f} {found['quantized_error']:10.5f}"
        )
    return results


@torch.no_grad()
def main() -> None:
    args = arguments()
    if args.session or args.suite or args.tune:
        import bench_gpu

        bench_gpu.run(args)
        return
    kinds = list(KINDS) if "all" in (args.kinds or []) else args.kinds or [f"int{args.bits}"]
    results = []
    for kind in kinds:
        results += measure_kind(kind, args)
    print(f"\nspeedup over dense {args.dtype} by rows\n{'':12}{'':15}" + "".join(f"{rows:7}" for rows in args.rows))
    for kind in kinds:
        own = [result for result in results if result["kind"] == kind]
        print(f"{kind:12}{own[0]['backend']:15}" + "".join(f"{result['speedup']:7.2f}" for result in own))
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "settings": vars(args)}
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
