"""Tokens per second of a model: prefill of a random prompt, then greedy decoding with the KV cache.

    python eval/speed.py MODEL --reference MODEL

With a reference the two are timed in turn, run by run, so that whatever else the machine does meets both; the ratio is
the median of the runs' own ratios. A model is a folder, dense or llmquant's, or a hub id. The last line of stdout is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from script import as_command
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llmquant  # noqa: F401  so that transformers loads its folders
from llmquant.checkpoint import locate
from llmquant.errors import PlanError
from llmquant.sampling import cache_word
from llmquant.text import evaluating

PHASES = ("prefill", "decode")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--reference", metavar="MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if min(args.prompt_tokens, args.new_tokens, args.batch, args.runs) < 1 or args.new_tokens < 2:
        parser.error("prompt tokens, batch and runs are at least 1, new tokens at least 2")
    return args


def load(name: str, args: argparse.Namespace) -> Any:
    model = AutoModelForCausalLM.from_pretrained(locate(name), dtype=getattr(torch, args.dtype)).to(args.device)
    asked = args.prompt_tokens + args.new_tokens
    if asked > (context := getattr(model.config.get_text_config(), "max_position_embeddings", asked)):
        raise PlanError(f"{name}: {asked} tokens are more than the model's context of {context}")
    return model


def timed_run(model: Any, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Tokens per second of each phase, all rows of prompt (batch, tokens) together.

    The prefill gives the first new token, so decoding is timed over the new_tokens - 1 that follow.
    """
    word = cache_word(model)
    start = now(model)
    answer = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = answer.logits[:, -1:].argmax(-1)
    middle = now(model)
    for _ in range(new_tokens - 1):
        answer = model(input_ids=token, use_cache=True, **{word: answer[word]})
        token = answer.logits[:, -1:].argmax(-1)
    end = now(model)
    return {
        "prefill": prompt.numel() / (middle - start),
        "decode": len(prompt) * (new_tokens - 1) / (end - middle),
    }


def now(model: Any) -> float:
    """Seconds, once the device has done all it was given."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def main() -> None:
    args = arguments()
    logging.disable_progress_bar()
    names = [args.model] if args.reference is None else [args.model, args.reference]
    models = [load(name, args) for name in names]
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (args.batch, args.prompt_tokens), generator=generator).to(args.device)

    runs: list[list[dict[str, float]]] = [[] for _ in models]
    with evaluating(*models):
        for run in range(args.runs + 1):
            for model, times in zip(models, runs, strict=True):
                found = timed_run(model, prompt, args.new_tokens)
                if run > 0:  # the first one warms up
                    times.append(found)

    print(f"{'model':40} {'prefill tok/s':>14} {'decode tok/s':>14}")
    results = []
    for name, times in zip(names, runs, strict=True):
        medians = {phase: median(found[phase] for found in times) for phase in PHASES}
        results.append({"name": name, "tokens_per_second": medians, "runs": times})
        print(f"{name[-40:]:40} {medians['prefill']:14.1f} {medians['decode']:14.1f}")
    report: dict[str, Any] = {"settings": vars(args), "threads": torch.get_num_threads(), "results": results}
    if args.reference is not None:
        pairs = list(zip(*runs, strict=True))
        report["ratio"] = {phase: median(after[phase] / before[phase] for after, before in pairs) for phase in PHASES}
        print(f"{'times the reference':40} {report['ratio']['prefill']:14.3f} {report['ratio']['decode']:14.3f}")
    print(json.dumps(report))


if __name__ == "__main__":
    as_command(main)
