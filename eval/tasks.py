"""Tasks of lm-evaluation-harness on a model, quantized or not: accuracy and the like, as the field reports it.

    python eval/tasks.py out --tasks hellaswag,arc_easy --limit 200
    python eval/tasks.py out --tasks my_task --include FOLDER   # a task of your own: FOLDER/my_task.yaml

The harness' own command works, too, where llmquant is imported first:

    python -c "import llmquant, lm_eval.__main__ as m; m.cli_evaluate()" --model hf --model_args pretrained=out ...
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch

import llmquant.hf  # noqa: F401  (registers the loader)
from llmquant.checkpoint import locate
from llmquant.exchange.extras import extra


def evaluate(
    model: str, tasks: list[str], *, include: Path | None = None, limit: int | None = None, batch: int = 8, dtype: str
) -> dict[str, Any]:
    """{task: {measure: value}}. include: a folder of tasks of your own; limit: questions a task."""
    harness, tables = extra("lm_eval"), extra("lm_eval.tasks")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hugging_face = extra("lm_eval.models.huggingface").HFLM
    wrapped = hugging_face(pretrained=str(locate(model)), dtype=dtype, batch_size=batch, device=device)
    manager = tables.TaskManager(include_path=None if include is None else str(include))
    found = harness.simple_evaluate(wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {name.removesuffix(",none"): value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }


def main() -> None:
    """A line a task, and as the last line of standard output one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, quantized or not, or a hub id")
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--include", type=Path, help="a folder of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions a task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", help="of the activations")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    options = {"include": args.include, "limit": args.limit, "batch": args.batch, "dtype": args.dtype}
    found = evaluate(args.model, args.tasks.split(","), **options)
    for task, values in found.items():
        print(task, ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
