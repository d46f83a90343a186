"""Card, report and comparison: pages that need nothing else, and say what the manifest says."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import llmquant
from llmquant import card, cli, comparison, description, inspection, report
from llmquant.recipe import QUALITIES

pytest.importorskip("matplotlib")
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Tags must close, ids be unique, and nothing be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._look(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._look(attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def _look(self, attributes: list[tuple[str, str | None]]) -> None:
        for key, value in attributes:
            if key == "id":
                self.ids.append(str(value))
            if key in ("src", "href", "xlink:href"):
                (self.references if str(value).startswith("#") else self.fetched).append(str(value))


def checked(html: str) -> Page:
    page = Page(html)
    assert page.open == []
    assert all(address.startswith("data:") for address in page.fetched)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    for svg in html.split("<svg")[1:]:
        xml.etree.ElementTree.fromstring("<svg" + svg[: svg.index("</svg>") + len("</svg>")])
    return page


@pytest.fixture(scope="module")
def folder(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run of two of the bundled model's matrices, by rules."""
    path = tmp_path_factory.mktemp("report") / "out"
    rules = [llmquant.Rule("*.o_proj", "int3:g32"), llmquant.Rule("*.up_proj", "int4:g64"), llmquant.Rule("*", None)]
    text = path.with_suffix(".txt")
    text.write_text(Path(report.__file__).read_text() * 4)
    recipe = llmquant.Recipe(tuple(rules))
    llmquant.quantize(pycode, path, format=recipe, quality="fast", calibration=str(text), samples=4, length=64)
    return path


def test_a_run_writes_its_report_and_card(folder: Path) -> None:
    facts = inspection.manifest(folder)
    page = checked((folder / "report.html").read_text())
    said = " ".join(page.texts)
    for heading in ("Where the error lies", "Steps of the solver", "The worst matrices", "Calibration", "Do it again"):
        assert heading in said
    assert f"{facts['bits_per_weight']:.3f}" in page.texts
    for tensor in facts["tensors"]:
        assert tensor["name"] in page.texts
    for kept in facts["kept_dense"]:
        assert kept["reason"] in page.texts
    assert len([text for text in page.texts if text == "quantized"]) == 3  # legends of the histograms
    assert inspection.verify(folder) == []


def test_histograms_count_every_weight(folder: Path) -> None:
    facts = inspection.manifest(folder)
    worst = sorted(facts["tensors"], key=lambda tensor: -tensor["output_error"])[:3]
    assert [one["name"] for one in facts["histograms"]] == [tensor["name"] for tensor in worst]
    for one, tensor in zip(facts["histograms"], worst, strict=True):
        assert sum(one["before"]) == sum(one["after"]) == tensor["shape"][0] * tensor["shape"][1]
        # A quantized weight has fewer values than bins of its range: more of them are empty.
        assert one["after"].count(0) > one["before"].count(0)


def test_the_same_run_describes_itself_in_the_same_bytes(folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("report.html", "README.md", "llmquant.json")}
    description.describe(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_largest_of_many_experts_stands_for_them() -> None:
    names = [("model.layers.0.experts.0.up", 0.1), ("model.layers.0.experts.7.up", 0.3), ("model.layers.1.up", 0.2)]
    rows, values = report._by_block([{"name": name, "error": error} for name, error in names], "error")
    assert rows == ["experts.*.up", "up"]
    assert values == [[0.3, None], [None, 0.2]]


def test_card_says_how_to_do_it_again(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    front = text.split("---\n")[1]
    assert "library_name: transformers" in front
    assert "base_model" not in front  # a folder of this machine is no model of the hub
    assert "base_model: owner/name" in card.text({**inspection.manifest(folder), "model": "owner/name"})
    assert "| matrices quantized | 12 |" in text
    rules = text[text.index("rules.json:\n") + 12 : text.index("\n```", text.index("rules.json:\n"))]
    assert json.loads(rules) == inspection.manifest(folder)["settings"]["recipe"]


def test_the_command_of_a_plain_run_is_understood(tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """It makes the same plan: the settings that the manifest has."""
    given = ["--format", "int4:g64:sym", "--skip", "*.o_proj", "--quality", "fast", "--clip", "minmax", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["llmquant", "quantize", str(tiny), *given, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    facts = inspection.manifest(tmp_path / "out")
    words = card.command(facts).replace("'", "").split()
    assert words[:3] == ["llmquant", "quantize", tiny.name]
    words[2] = str(tiny)
    monkeypatch.setattr(sys, "argv", [*words, "-o", str(tmp_path / "again")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert inspection.manifest(tmp_path / "again")["settings"] == facts["settings"]
    capsys.readouterr()


def test_the_command_names_the_quality_and_what_else_was_asked(folder: Path) -> None:
    """Of a run whose rules hold what the quality brought with it: these are not asked for again."""
    facts = inspection.manifest(folder)
    recipe = llmquant.Recipe.uniform("int4:g64", clip="mse").with_options(QUALITIES["best"].options).to_json()
    calibration = {**facts["settings"]["calibration"], "source": "self", "curvature": QUALITIES["best"].curvature}
    asked = {"recipe": recipe, "calibration": calibration, "tuning": QUALITIES["best"].tuning, "rotate": "value"}
    words = card.command({**facts, "model": "m", "settings": {**facts["settings"], **asked}})
    begun = "llmquant quantize m --format int4:g64 --clip mse --quality best --rotate value --calibration self"
    assert words == f"{begun} --samples 4 --length 64 --seed 0"


def test_tuning_verification_and_recoveries_are_told(folder: Path) -> None:
    facts = inspection.manifest(folder)
    assert facts["verification"]["tokens"] > 0
    text = (folder / "README.md").read_text()
    assert f"| verified | on {facts['verification']['tokens']} tokens: KL" in text
    assert text.count("| recovered: ") == len(card.recovered(facts))
    assert "tuning" not in text
    facts["tuning"] = {"kept": True, "divergences": [[0, 0.5], [150, 0.25]], "codes": True}
    facts["recoveries"] = [{"name": f"layers.{layer}.up", "what": "rounded to nearest"} for layer in (0, 1)]
    text, page = card.text(facts), checked(report.page(facts))
    assert "| tuning of all blocks together | kept: KL on held-out tokens 0.5 -> 0.25 |" in text
    assert "| recovered: `layers.*.up (2 of them)` | rounded to nearest |" in text
    assert {"rounded to nearest", "kept: KL on held-out tokens 0.5 -> 0.25"} <= set(page.texts)
    assert {block["name"] or "outside" for block in facts["verification"]["blocks"]} <= set(page.texts)


def test_what_was_measured_is_shown(folder: Path, tmp_path: Path) -> None:
    facts = inspection.manifest(folder)
    facts["evaluation"] = {"kl_mean": 0.0123, "model": {"perplexity": 12.5}, "reference": {"perplexity": 11.25}}
    page = checked(report.page(facts))
    assert {"0.0123", "11.25 → 12.5"} <= set(page.texts)
    assert "| perplexity | 11.25 -> 12.5 |" in card.text(facts)


def test_without_matplotlib_the_page_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    html = report.page(inspection.manifest(folder))
    assert "llmquant[plot]" in html
    assert "<svg" not in html
    checked(html)


def test_names_from_a_model_are_text(folder: Path) -> None:
    facts = {**inspection.manifest(folder), "model": "<script>alert(1)</script>"}
    assert "<script" not in report.page(facts)


# ---- comparison


def test_best_are_those_that_no_other_beats() -> None:
    points = [(4.0, 0.1), (3.0, 0.5), (4.5, 0.2), (8.0, 0.01), (3.0, 0.4), (9.0, 0.01)]
    assert comparison.best(points) == [4, 0, 3]


def test_compare(folder: Path, pycode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text, page = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text(Path(comparison.__file__).read_text())
    options = ["--text", str(text), "--window", "128", "--max-windows", "2", "-o", str(page), "--json"]
    command = ["llmquant", "compare", str(folder), "--reference", str(pycode), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    reference, entry = json.loads(capsys.readouterr().out)
    assert (reference["name"], reference["kl"], entry["name"]) == ("pycode", None, "out")
    alone = llmquant.evaluate(folder, str(text), reference=pycode, window=128, max_windows=2)
    assert entry["kl"] == pytest.approx(alone["kl_mean"])
    assert entry["perplexity"] == pytest.approx(alone["model"]["perplexity"])
    assert reference["perplexity"] == pytest.approx(alone["reference"]["perplexity"])
    assert entry["bits_per_weight"] == pytest.approx(inspection.manifest(folder)["bits_per_weight"])
    said = checked(page.read_text()).texts
    assert {reference["writes"], entry["writes"]} <= {text.replace("\r\n", "\n") for text in said}
