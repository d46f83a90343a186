"""What a plan says a run will take is what it takes: measured from outside, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

RUN = textwrap.dedent("""
    import json, sys, threading
    from pathlib import Path
    from safetensors.torch import save_file
    import torch
    from llmquant import estimate, pipeline
    from llmquant.recipe import Recipe
    import llmquant.solvers

    def anonymous():
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())

    model, output, calibrated = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "calibrated"
    tokens = Path(sys.argv[2] + ".safetensors")
    save_file({"tokens": torch.randint(3, 500, (8, 128), generator=torch.Generator().manual_seed(0))}, tokens)
    shown = pipeline.Calibration(str(tokens), samples=8, batch=2) if calibrated else None
    prepared = pipeline.prepare(pipeline.Job(model, Recipe.uniform("int4:g128"), shown), output)
    before, seen, done = anonymous(), [], threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    pipeline.quantize(prepared, output)
    done.set()
    watcher.join()
    planned = prepared.plan.peak_memory
    print(json.dumps({"planned": planned, "base": estimate.BASE, "before": before, "peak": max(seen)}))
""")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("way", ["fast", "calibrated"])
def test_a_run_takes_the_memory_that_its_plan_names(way: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    words = [sys.executable, "-c", RUN, str(tmp_path / "model"), str(tmp_path / "out"), way]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < found["planned"], found
    assert found["peak"] - found["before"] > (found["planned"] - found["base"]) / 2, found
