"""Time multiplication by quantized weights side by side with torch's own by dense ones, and check both by float64.

    python kernels/bench.py --bits 4 --group 128 --shape 4096 4096 --rows 1 2 4 8 16 64 256

Several weights are used in turn (--weights), as the layers of a model are, so that no cache holds them all. Dense and
quantized runs alternate; a ratio is the median of pairs. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import llmquant_kernels
from llmquant_kernels import PackedWeight, Prepared


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale; 0: one scale a row")
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 4096), metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--weights", type=int, default=8, help="different weights used in turn")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-decoded", action="store_true", help="trade memory for speed on many rows")
    return parser.parse_args()


def random_weight(args: argparse.Namespace, generator: torch.Generator) -> PackedWeight:
    rows, columns = args.shape
    words = -(-columns * args.bits // 32)
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=generator).int()
    group = args.group or columns
    scale = torch.randn(rows, -(-columns // group), generator=generator).bfloat16() / 2**args.bits / columns**0.5
    middle = 2 ** (args.bits - 1)
    return PackedWeight(packed.to(args.device), args.bits, (rows, columns), group, scale.to(args.device), zero=middle)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def timed(call: Callable[[], Tensor], device: str) -> float:
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(
    x: Tensor, exact: Tensor, dense: list[Tensor], prepared: list[Prepared], args: argparse.Namespace
) -> dict[str, Any]:
    """One number of rows. exact: the first weight decoded to float64."""
    reference = x.double() @ exact.T
    errors = [relative_error(linear(x, dense[0]), reference)]
    errors.append(relative_error(llmquant_kernels.linear(x, prepared[0]), reference))
    pairs = []
    for run in range(args.runs + 2):
        i = run % len(dense)
        before = timed(lambda i=i: linear(x, dense[i]), args.device)  # type: ignore[misc]
        after = timed(lambda i=i: llmquant_kernels.linear(x, prepared[i]), args.device)  # type: ignore[misc]
        pairs.append((before, after))
    pairs = pairs[2:]
    return {
        "rows": len(x),
        "dense_ms": 1e3 * median(pair[0] for pair in pairs),
        "quantized_ms": 1e3 * median(pair[1] for pair in pairs),
        "speedup": median(before / after for before, after in pairs),
        "dense_error": errors[0],
        "quantized_error": errors[1],
    }


@torch.no_grad()
def main() -> None:
    args = arguments()
    dtype = getattr(torch, args.dtype)
    generator = torch.Generator().manual_seed(0)
    weights = [random_weight(args, generator) for _ in range(args.weights)]
    dense = [llmquant_kernels.decode(weight, dtype) for weight in weights]
    prepared = [llmquant_kernels.prepare(weight, dtype=dtype, keep_decoded=args.keep_decoded) for weight in weights]
    exact = llmquant_kernels.decode(weights[0], torch.float32).double()
    print(llmquant_kernels.explain(weights[0], dtype))
    print(f"{'rows':>5} {'dense ms':>9} {'quantized ms':>13} {'speedup':>8} {'error, dense':>13} {'quantized':>10}")
    results = []
    for rows in args.rows:
        x = torch.randn(rows, args.shape[1], generator=generator).to(args.device, dtype)
        found = measure(x, exact, dense, prepared, args)
        results.append(found)
        print(
            f"{rows:5} {found['dense_ms']:9.3f} {found['quantized_ms']:13.3f} {found['speedup']:8.2f} "
            f"{found['dense_error']:13.5f} {found['quantized_error']:10.5f}"
        )
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "settings": vars(args)}
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
