"""lm-evaluation-harness on a quantized folder, with a task defined here: no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llmquant

ROOT = Path(__file__).parents[1]
TASK = """
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
DOCUMENTS = [
    {
        "question": "def __init__(self, name):",
        "choices": ["\n    self.name = name", "\n    banana telephone"],
        "answer": 0,
    },
    {"question": "import os\nimport", "choices": [" sys", " ((("], "answer": 1},
    {"question": "for i in", "choices": [" !!", " range(10):"], "answer": 1},
    {"question": "if x is None:", "choices": ["\n    return None", "\n zebra@"], "answer": 0},
]


def test_a_task_of_ones_own(pycode: Path, tmp_path: Path) -> None:
    """The accuracy is that of comparing log-likelihoods here."""
    pytest.importorskip("lm_eval")
    llmquant.quantize(pycode, tmp_path / "q", format="int8:g64", quality="fast", report=False)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "next_line.yaml").write_text(TASK.format(data=data))
    options = ["--tasks", "next_line", "--include", tmp_path / "tasks", "--dtype", "float32"]
    command = [sys.executable, ROOT / "eval" / "tasks.py", tmp_path / "q", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])["next_line"]
    assert found["acc"] == pytest.approx(accuracy(tmp_path / "q"))
    assert 0 < found["acc"] < 1  # one answer of the four is wrong by design


@torch.no_grad()
def accuracy(folder: Path) -> float:
    model, tokenizer = llmquant.load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)

    def likelihood(question: str, choice: str) -> float:
        start = len(tokenizer(question).input_ids)
        tokens = tokenizer(question + choice, return_tensors="pt").input_ids
        logs = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
        return float(logs[start - 1 :].sum())

    right = 0
    for document in DOCUMENTS:
        values = [likelihood(str(document["question"]), choice) for choice in document["choices"]]  # type: ignore[attr-defined]
        right += values.index(max(values)) == document["answer"]
    return right / len(DOCUMENTS)
