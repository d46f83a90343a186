"""Perplexity of models on a text, by the protocol of GPTQ or over separate documents.

    python eval/perplexity.py MODEL [MODEL...] --text Salesforce/wikitext:wikitext-2-raw-v1:test --protocol gptq

A model is a folder, dense or llmquant's, or a hub id. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    parser.add_argument("--text", required=True, help="a text file, .json, .jsonl, .parquet, or name[:config][:split]")
    parser.add_argument("--protocol", choices=text.PROTOCOLS, default="documents")
    parser.add_argument("--window", type=int, help="tokens in a window (default: the model's context, 2048 at most)")
    parser.add_argument("--max-windows", type=int, help="evaluate only the first of them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def evaluate(name: str, documents: list[str], args: argparse.Namespace) -> dict[str, Any]:
    folder = locate(name)
    size = metrics.stored_size(folder)
    tokenizer = text.load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)
    length = text.window_length(model.config, args.window)
    windows = text.windows(text.token_stream(tokenizer, documents, protocol=args.protocol), length)[: args.max_windows]
    # All rows of the logits count, padding too: so it is in published figures.
    found = metrics.perplexity(model, windows, progress=show_progress if sys.stderr.isatty() else None)
    begins = windows[0, 0].item() == tokenizer.bos_token_id
    return {"name": name, **found.to_dict(), "window": length, "begins_with_bos": begins, "size": size.to_dict()}


def show_progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} windows", end="\n" if done == total else "", file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    documents = text.read_documents(args.text)
    print(f"{'model':40} {'perplexity':>10} {'+-':>8} {'tokens':>9} {'bits/parameter':>14} {'MB':>9}")
    rows = []
    for name in args.models:
        row = evaluate(name, documents, args)
        rows.append(row)
        error = row["perplexity"] * (row["nll_standard_error"] or 0)
        size = row["size"]
        print(
            f"{name[-40:]:40} {row['perplexity']:10.4f} {error:8.4f} {row['tokens']:9} "
            f"{size['bits_per_parameter']:14.3f} {size['file_bytes'] / 1e6:9.2f}"
        )
    print(json.dumps({"settings": vars(args), "results": rows}))


if __name__ == "__main__":
    as_command(main)
