"""The comparison with other tools, without any of them: tokens, layers, tables, and tools that are not there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_text import letters, tiny

from llmquant import recipe
from llmquant.errors import DataError
from llmquant.sampling import sample_windows

ROOT = Path(__file__).parents[1]

compare: Any = importlib.import_module("compare")
rivals: Any = importlib.import_module("rivals")
tables: Any = importlib.import_module("tables")


def shown(method: str, seed: int = 0) -> tuple[str, int, int]:
    return ("none", 0, 0) if method in compare.SEEDLESS else ("text", 128, seed)


def result(method: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    known = dict(zip(compare.KEY, ("model", "int3:g32:sym", method, *shown(method, seed), 1), strict=True))
    measured = {"kl": 0.1, "kl_standard_error": 0.001, "perplexity": 12.0, "top1_agreement": 0.8, "layers_changed": 42}
    spent = {"windows": 128, "layers": 42, "cpu_seconds": 3.0, "wall_seconds": 4.0, "peak_bytes": 5_000_000}
    return {**known, **measured, **spent, **figures}


# ---- tokens


def test_a_file_is_split_by_document_and_no_text_is_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text(json.dumps(["a", "b", "c", "d", "a", "e", "f", "g"]))  # "a" is there twice
    calibration, evaluation = compare.documents(str(path), 0.5)
    assert calibration == ["a", "b", "c", "d"]
    assert evaluation == ["e", "f", "g"]


def test_the_bundled_model_is_calibrated_on_what_it_was_trained_on_and_measured_on_what_was_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import train_pycode

    monkeypatch.setattr(train_pycode, "documents", lambda held_out: ["held out" if held_out else "trained on"])
    assert compare.documents("pycode", 0.35) == (["trained on"], ["held out"])


def test_seeds_choose_calibration_windows() -> None:
    rows = torch.arange(40).view(20, 2)
    first, again, other = (compare.drawn(rows, 8, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len({row[0] for row in first.tolist()}) == 8


def test_evaluation_windows_are_spread_over_the_text() -> None:
    assert compare.spread(torch.arange(42).view(21, 2), 5)[:, 0].tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("choose", [lambda rows: compare.drawn(rows, 9, 0), lambda rows: compare.spread(rows, 9)])
def test_too_little_text_is_refused(choose: Any) -> None:
    with pytest.raises(DataError, match="8 windows of 2 tokens"):
        choose(torch.zeros(8, 2, dtype=torch.int64))


# ---- what is quantized


def test_layers_are_the_linears_of_blocks(pycode: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pycode))
    layers, skipped = compare.chosen_layers(model)
    assert len(layers) == 6 * 7
    assert skipped == []
    assert all(".layers." in name for name in layers)
    layers, skipped = compare.chosen_layers(model, only_divisible=256)
    assert layers == []
    assert len(skipped) == 42


def test_levels_are_counted_in_groups() -> None:
    weight = torch.tensor([[0.0, 1.0, 1.0, 0.0, 3.0, 4.0, 5.0, 5.0]])
    assert compare.levels(weight, 4) == 3
    assert compare.levels(weight, 8) == 5


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("int3:g32:sym", ("int", 3, 32, True)),
        ("int4:g128:asym", ("int", 4, 128, False)),
        ("mxfp4", ("mxfp4", 4, 32, True)),
    ],
)
def test_formats_are_read_alike_on_both_sides(spec: str, expected: tuple[str, int, int, bool]) -> None:
    assert rivals.parse(spec) == expected
    assert compare.columns(spec) == expected[2]


def test_every_method_has_its_run() -> None:
    own = {f"llmquant-{quality}" for quality in recipe.QUALITIES}
    assert set(compare.METHODS) == own | set(rivals.METHODS)


# ---- results


def test_results_are_read_as_written_one_to_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    written = [result("gptqmodel"), result("auto-round", error="it broke")]
    compare.write_results(path, written)
    assert sorted(map(str, compare.read_results(path))) == sorted(map(str, written))
    assert len(path.read_text().splitlines()) == 2 + len(written)
    assert compare.read_results(tmp_path / "none.json") == []


def test_results_that_name_no_calibration_are_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    rows = [result("auto-round", 1), result("hqq")]
    old = [{key: value for key, value in row.items() if not key.startswith("calibration")} for row in rows]
    path.write_text(json.dumps({"results": old}))
    assert [compare.identity(row) for row in compare.read_results(path)] == [compare.identity(row) for row in rows]


def test_what_a_method_is_shown() -> None:
    """Windows of a text, what the model samples, or nothing."""
    args = compare.arguments(["model", "--text", "text.json", "--output", "x", "--length", "8"])
    assert (args.calibration, args.calibration_windows) == (["text"], [128])
    rows = torch.arange(160).view(20, 8)
    setting = compare.Setting(args, tiny(), letters(), {"text": rows, "other.json": rows + 1}, rows, [], [])
    assert torch.equal(setting.tokens(compare.Shown("other.json", 4, 3)), compare.drawn(rows + 1, 4, 3))
    own = setting.tokens(compare.Shown("self", 4, 3))
    assert torch.equal(own, sample_windows(tiny(), bos_token_id=0, count=4, length=8, seed=3))
    assert setting.tokens(compare.Shown()).shape == (0, 8)


def test_the_table_has_means_over_seeds_and_the_best_first() -> None:
    runs = [result("rtn", kl=0.3), result("auto-round", kl=0.1), result("auto-round", 1, kl=0.2)]
    runs += [result("auto-round", kl=0.4, calibration="self"), result("auto-round", kl=0.5, calibration_windows=16)]
    failed = {key: value for key, value in result("hqq").items() if key != "kl"} | {"error": "it broke"}
    lines = compare.table([*runs, failed]).splitlines()
    assert lines[2].startswith("| model | int3:g32:sym | auto-round | 0,1 | 0.15000 |")
    assert lines[3].startswith("| model | int3:g32:sym | rtn | 0 | 0.30000 |")
    assert lines[4].startswith("| model | int3:g32:sym | auto-round (self, 128 windows) | 0 | 0.40000 |")
    assert lines[5].startswith("| model | int3:g32:sym | auto-round (text, 16 windows) | 0 | 0.50000 |")
    assert lines[6] == "| model | int3:g32:sym | hqq | failed: it broke |"


def test_tools_without_environment_are_skipped_by_name(
    pycode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare.py", str(pycode), "--text", "pycode", "--output", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", [*argv, "--methods", "gptqmodel", "auto-round", "hqq"])
    monkeypatch.setattr(compare.Setting, "make", lambda args: None)
    compare.main()
    printed = capsys.readouterr()
    for tool in ("gptqmodel", "auto-round", "hqq"):
        assert f"{tool}: skipped, no environment was given (--python {tool}=PATH)" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["results"] == []


def test_an_unknown_tool_is_a_wrong_command_line() -> None:
    with pytest.raises(SystemExit):
        compare.arguments(["model", "--text", "pycode", "--output", "x", "--python", "nothing=python"])


def test_ratios_are_over_the_seeds_that_both_ran() -> None:
    runs = [result("llmquant-best", seed, kl=kl) for seed, kl in ((0, 0.1), (1, 0.3), (2, 9.0))]
    runs += [result("auto-round", seed, kl=kl) for seed, kl in ((0, 0.4), (1, 0.4), (3, 9.0))]
    lines = tables.ratios(runs, [("llmquant-balanced", "auto-round"), ("llmquant-best", "auto-round")])
    assert lines[0] == "| model | format | balanced / auto-round | best / auto-round |"
    assert lines[2:] == ["| model | int3:g32:sym |  | 0.50 (2) |"]


def test_the_page_of_results_is_what_the_script_makes() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == tables.page()
