"""The whole flow in ten seconds: quantize the bundled model by command, load it in one line, measure what was lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from llmquant import cli


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmquant", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_quantize_load_measure(
    pycode: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    command = ["quantize", str(pycode), "--bits", "4", "--group", "64", "--output", str(folder)]
    assert run([*command, "--samples", "4", "--length", "128", "--json"], monkeypatch) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["bits_per_weight"] == pytest.approx(4.25, abs=0.01)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def __init__(self", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0], skip_special_tokens=True).startswith("def __init__(self")
    assert torch.isfinite(model(**prompt).logits).all()

    measure = ["eval", str(folder), "--reference", str(pycode), "--text", str(held_out), "--max-windows", "8", "--json"]
    assert run(measure, monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["kl_mean"] < 0.1
    assert found["model"]["perplexity"] < 1.1 * found["reference"]["perplexity"]

    assert run(["inspect", str(folder), "--verify", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
