"""The whole flow again and again, with changing models and formats: memory, files and handles must not grow.

    python eval/soak.py --minutes 20
    python eval/soak.py MODEL ... --minutes 60 --formats int4:g64 mxfp4

One turn quantizes a model, loads the result, lets it write, verifies it against the original, checks every hash, and
deletes it; every third turn is calibrated. Models are folders or hub ids; left out, a few small random ones are made,
dense and with experts. Exit code 1 where the last quarter of the turns holds more than the second one; in the first,
all that is made once and kept, such as compiled loops, comes to be. The last line of stdout is one JSON object. Linux
only: reads /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

import llmquant
from llmquant import inspection, pipeline, verification
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint, locate
from llmquant.errors import LlmquantError
from llmquant.recipe import Recipe

FORMATS = ["int4:g32", "int3:g32:asym", "mxfp4", "nvfp4", "mx6", "nf4:g32", "kmeans3:channel", "ternary:g32", "vsq4:s4"]
CALIBRATION = pipeline.Calibration("self", samples=4, length=16, batch=2)
CALIBRATED = 3  # every so many turns
GROWTH = 0.02  # of the resident memory, from the second quarter to the last


@dataclass(frozen=True)
class Held:
    """What the process holds between two turns."""

    seconds: float
    resident: int
    anonymous: int
    handles: int
    threads: int
    files: int  # in the temporary folder, beside the models


def main() -> None:
    args = arguments()
    disable_progress_bar()
    logging.getLogger("llmquant").setLevel(logging.ERROR)  # small random models have no tokenizer to sample with
    with tempfile.TemporaryDirectory() as place:
        tempfile.tempdir = place  # so that whatever is left over by anyone is seen
        try:
            models = [str(locate(model)) for model in args.models] or small_models(Path(place) / "models")
            found = soak(models, args.formats, 60 * args.minutes, Path(place))
        except LlmquantError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        finally:
            tempfile.tempdir = None
    problems = grown(found)
    for problem in problems:
        print(problem, file=sys.stderr)
    ends = {"first": asdict(found[0]), "middle": asdict(found[len(found) // 2]), "last": asdict(found[-1])}
    print(json.dumps({"turns": len(found), **ends, "problems": problems}))
    sys.exit(1 if problems else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    args = parser.parse_args()
    if args.minutes <= 0:
        parser.error("minutes are above 0")
    return args


def small_models(folder: Path) -> list[str]:
    """Random models of the architectures whose paths through the code differ most."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    configs = {
        "tied": LlamaConfig(**sizes, tie_word_embeddings=True),
        "untied": LlamaConfig(**{**sizes, "hidden_size": 96}, tie_word_embeddings=False),
        "experts": Qwen3MoeConfig(**sizes, **experts),
    }
    torch.manual_seed(0)
    for name, config in configs.items():
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return [str(folder / name) for name in configs]


def soak(models: list[str], formats: list[str], seconds: float, place: Path) -> list[Held]:
    """Turn after turn; what was held after each."""
    start, found = time.monotonic(), list[Held]()
    for number in count():
        model, spec = models[number % len(models)], formats[number % len(formats)]
        turn(model, spec, place / "out", CALIBRATION if number % CALIBRATED == 0 else None, number)
        found.append(held(time.monotonic() - start, place))
        print(
            f"{number + 1:5} {spec:16} {found[-1].resident / 2**20:8.1f} MiB, {found[-1].handles} handles", flush=True
        )
        if found[-1].seconds >= seconds and len(found) >= 4 * max(len(models), len(formats)):
            return found
    raise AssertionError


def turn(model: str, spec: str, output: Path, calibration: pipeline.Calibration | None, seed: int) -> None:
    job = pipeline.Job(model, Recipe.uniform(spec), calibration, seed=seed)
    facts = pipeline.quantize(pipeline.prepare(job, output), output)
    loaded = llmquant.load(output)
    start = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        written = loaded.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False)
    assert written.shape[0] == 1
    reference = StreamedModel(Checkpoint(Path(model)))
    windows = verification.random_windows(reference, 2, 16)
    verification.verify(output, reference, windows, manifest=facts).check(output, "it does not match")
    if problems := inspection.verify(output):
        raise llmquant.LlmquantError(f"{output}: {problems[0]}")
    for path in output.iterdir():
        path.unlink()
    output.rmdir()


def held(seconds: float, place: Path) -> Held:
    """After garbage was collected and free memory given back, as far as the C library does."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    resident, anonymous = (1024 * int(facts[key].split()[0]) for key in ("VmRSS", "RssAnon"))
    files = sum(1 for path in place.rglob("*") if path.relative_to(place).parts[0] != "models")
    return Held(seconds, resident, anonymous, len(os.listdir("/proc/self/fd")), threading.active_count(), files)


def grown(found: list[Held]) -> list[str]:
    """What the last quarter holds more of than the second one."""
    quarter = len(found) // 4
    before, after = found[quarter : 2 * quarter], found[-quarter:]
    problems = [
        f"{what} grew from {max(getattr(one, what) for one in before)} to {max(getattr(one, what) for one in after)}"
        for what in ("handles", "threads", "files")
        if max(getattr(one, what) for one in after) > max(getattr(one, what) for one in before)
    ]
    for what in ("resident", "anonymous"):
        early, late = (median(getattr(one, what) for one in part) for part in (before, after))
        if late > (1 + GROWTH) * early:
            problems.append(f"{what} memory grew from {early / 2**20:.1f} to {late / 2**20:.1f} MiB")
    return problems


if __name__ == "__main__":
    main()
