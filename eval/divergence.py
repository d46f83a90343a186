"""How far models are from their reference: KL divergence, top-1 agreement, perplexity ratio.

    python eval/divergence.py MODEL [MODEL...] --reference MODEL --text held_out.txt

Tokens are those of the reference's tokenizer. A model is a folder, dense or llmquant's, or a hub id. The last line of
stdout is one JSON object; divergences are in nats per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from script import as_command
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmquant  # noqa: F401  so that transformers loads its folders
from llmquant import metrics, text
from llmquant.checkpoint import locate


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--reference", required=True, metavar="MODEL")
    parser.add_argument("--text", required=True, help="a text file, .json, .jsonl, .parquet, or name[:config][:split]")
    parser.add_argument("--protocol", choices=text.PROTOCOLS, default="documents")
    parser.add_argument("--window", type=int, help="tokens in a window (default: the model's context, 2048 at most)")
    parser.add_argument("--max-windows", type=int, help="evaluate only the first of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load(folder: Path, args: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)


def show_progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} windows", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    documents = text.read_documents(args.text)
    folders = {name: locate(name) for name in [args.reference, *args.models]}
    sizes = {name: metrics.stored_size(folder).to_dict() for name, folder in folders.items()}
    tokenizer = text.load_tokenizer(folders[args.reference])
    reference = load(folders[args.reference], args)
    length = text.window_length(reference.config, args.window)
    windows = text.windows(text.token_stream(tokenizer, documents, protocol=args.protocol), length)[: args.max_windows]

    print(
        f"{'model':32} {'KL':>9} {'+-':>8} {'median':>8} {'99 %':>8} {'99.9 %':>8} {'max':>8} {'top-1':>7} "
        f"{'dp':>7} {'ppl':>9} {'ratio':>7} {'bits/parameter':>14}"
    )
    rows = []
    for name in args.models:
        found = metrics.divergence(
            reference,
            load(folders[name], args),
            windows,
            vocabulary=text.vocabulary_size(tokenizer),
            progress=show_progress if sys.stderr.isatty() else None,
        )
        rows.append({"name": name, **found.to_dict(), "size": sizes[name]})
        print(
            f"{name[-32:]:32} {found.mean:9.5f} {found.standard_error or 0:8.5f} {found.median:8.5f} "
            f"{found.percentile_99:8.4f} {found.percentile_99_9:8.4f} {found.maximum:8.4f} {found.top1_agreement:7.2%} "
            f"{found.rms_probability_change:7.4f} {found.model.perplexity:9.4f} {found.perplexity_ratio:7.4f} "
            f"{sizes[name]['bits_per_parameter']:14.3f}"
        )
    settings = {**vars(args), "window": length, "reference_size": sizes[args.reference]}
    print(json.dumps({"settings": settings, "results": rows}))


if __name__ == "__main__":
    as_command(main)
