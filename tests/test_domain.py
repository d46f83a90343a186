"""Text of another kind than the model's: it is noticed by the model's own surprise, and mended by its own words."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import Cut, contents, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import card, domain, metrics, pipeline, report, text
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import Checkpoint
from llmquant.errors import DataError
from llmquant.output import CALIBRATION
from llmquant.recipe import Recipe

NOUNS = ("cat", "dog", "king", "river", "house", "mother", "boat", "forest", "star", "friend", "garden", "stone")
ADJECTIVES = ("old", "small", "happy", "quiet", "green", "lonely", "brave")
VERBS = ("saw", "loved", "followed", "found", "carried", "forgot")


def english(sentences: int) -> str:
    """A story without sense; the bundled model has read Python only."""
    draw = random.Random(0)

    def thing() -> str:
        return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"

    return " ".join(
        f"The {thing()} {draw.choice(VERBS)} a {thing()}, and the {draw.choice(NOUNS)} was {draw.choice(ADJECTIVES)}."
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(english(400))
    return path


def shown(source: Path | str, **options: int | bool) -> pipeline.Calibration:
    return pipeline.Calibration(str(source), samples=8, length=128, batch=4, curvature=0, **options)  # type: ignore[arg-type]


def by_hand(model: torch.nn.Module, windows: Tensor) -> float:
    """Cross-entropy less entropy, by torch's distributions and the whole model."""
    with torch.no_grad():
        said = torch.distributions.Categorical(logits=model(windows).logits[:, :-1].double())
    return float((-said.log_prob(windows[:, 1:]) - said.entropy()).mean())


def test_the_excess_is_that_of_the_whole_model(
    pycode: Path, held_out: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = StreamedModel(Checkpoint(pycode), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    tokenizer = text.load_tokenizer(pycode)
    own = text.sample_windows(whole, bos_token_id=whole.config.bos_token_id, count=16, length=128, seed=0)
    documents = {"code": json.loads(held_out.read_text())[:8], "story": [story.read_text()]}
    windows = {
        name: text.windows(text.token_stream(tokenizer, some, protocol="documents"), 128)[:16]
        for name, some in documents.items()
    }
    found = {name: domain.excess(streamed, rows, batch=4) for name, rows in {**windows, "own": own}.items()}
    for name, rows in {**windows, "own": own}.items():
        assert found[name] == pytest.approx(by_hand(whole, rows), abs=1e-3)
    assert abs(found["own"]) < 0.1
    assert found["code"] < domain.MOST < 2 * domain.MOST < found["story"]
    monkeypatch.setattr(domain, "CHUNK_BYTES", 4 * 1536 * 50)  # a window in three pieces
    assert domain.excess(streamed, windows["code"], batch=3) == pytest.approx(found["code"], abs=1e-5)
    monkeypatch.setattr(domain, "TOKENS", 300)
    few = windows["code"][[0, 7, 15]]
    assert domain.excess(streamed, windows["code"]) == pytest.approx(by_hand(whole, few), abs=1e-3)


def test_half_of_the_wrong_text_becomes_the_models_own(
    pycode: Path, story: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run that is cut and taken up again, too."""
    monkeypatch.setattr(logging.getLogger("llmquant"), "propagate", True)
    manifest = quantize(pycode, tmp_path / "whole", calibration=shown(story))
    fit = manifest["calibration_fit"]
    assert (fit["windows"], fit["own_windows"], fit["bound"]) == (8, 4, domain.MOST)
    assert fit["excess"] > 1
    assert "is not the kind of text that the model was made for" in caplog.text
    assert "4 of 8 windows are the model's own samples instead" in caplog.text

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("block 3 "):
            raise Cut

    job = pipeline.Job(str(pycode), Recipe.uniform("int4:g32"), shown(story))
    with pytest.raises(Cut):
        pipeline.quantize(pipeline.prepare(job, tmp_path / "cut"), tmp_path / "cut", progress=progress)
    kept = load_file(tmp_path / "cut.partial" / CALIBRATION)
    tokenizer, whole = text.load_tokenizer(pycode), AutoModelForCausalLM.from_pretrained(pycode)
    asked = text.calibration_windows(tokenizer, str(story), count=8, length=128, seed=0)
    own = text.sample_windows(whole, bos_token_id=whole.config.bos_token_id, count=4, length=128, seed=0)
    assert kept["own"].tolist() == [False, True] * 4
    assert torch.equal(kept["tokens"][::2], asked[::2])
    assert torch.equal(kept["tokens"][1::2], own)
    quantize(pycode, tmp_path / "cut", calibration=shown(story))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")

    for said in (card.text(manifest), report.page(manifest)):
        assert "4 of 8 windows are the model" in said
    unchecked = quantize(pycode, tmp_path / "unchecked", calibration=shown(story, check=False))
    assert "calibration_fit" not in unchecked
    assert "--no-calibration-check" in card.command(unchecked)


def test_text_of_the_right_kind_stays_as_it_is(pycode: Path, held_out: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "checked", tmp_path / "unchecked"]
    checked, unchecked = (
        quantize(pycode, folder, calibration=shown(held_out, check=folder is folders[0])) for folder in folders
    )
    assert checked["calibration_fit"]["own_windows"] == 0
    assert checked["calibration_fit"]["excess"] < domain.MOST
    assert "calibration_fit" not in quantize(pycode, tmp_path / "self", calibration=shown("self"))
    shards = [
        {name: digest for name, digest in contents(folder).items() if name.endswith("tensors")} for folder in folders
    ]
    assert len(shards[0]) == 7
    assert shards[0] == shards[1]
    assert unchecked["settings"]["calibration"]["check"] is False


def test_the_wrong_text_does_not_end_worse_than_none(pycode: Path, held_out: Path, story: Path, tmp_path: Path) -> None:
    tokenizer = text.load_tokenizer(pycode)
    documents = json.loads(held_out.read_text())
    windows = text.windows(text.token_stream(tokenizer, documents, protocol="documents"), 256)
    windows = windows[torch.linspace(0, len(windows) - 1, 16).long()]
    reference = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)

    def divergence(name: str, calibration: pipeline.Calibration | None) -> float:
        quantize(pycode, tmp_path / name, "int3:g64", calibration=calibration)
        return metrics.divergence(reference, llmquant.load(tmp_path / name, dtype=torch.float32), windows).mean

    fast = divergence("fast", None)
    as_it_is = divergence("as it is", shown(story, check=False))
    assert divergence("mended", shown(story)) < fast < as_it_is


def test_without_room_for_the_models_samples_the_wrong_text_is_refused(
    pycode: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipeline.Job(str(pycode), Recipe.uniform("int4:g32"), shown(story))
    prepared = pipeline.prepare(job, tmp_path / "out")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6, total=10**6))
    with pytest.raises(DataError, match=r"story.txt: is not the kind of text .* need all of it in memory.*-check"):
        pipeline.quantize(prepared, tmp_path / "out")
