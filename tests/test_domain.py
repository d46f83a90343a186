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
from architectures import make_checkpoint
from safetensors.torch import load_file, save_file
from test_pipeline import contents, cut_after, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import card, domain, metrics, pipeline, report, sampling, text
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


def windows_of(pycode: Path, documents: list[str], count: int, length: int) -> Tensor:
    stream = text.token_stream(text.load_tokenizer(pycode), documents, protocol="documents")
    return text.windows(stream, length)[:count]


@pytest.fixture(scope="module")
def own(pycode: Path) -> Tensor:
    """What the bundled model writes."""
    model = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    return sampling.sample_windows(model, bos_token_id=model.config.bos_token_id, count=16, length=64, seed=0)


def by_hand(model: torch.nn.Module, windows: Tensor) -> float:
    """Cross-entropy less entropy, by torch's distributions and the whole model."""
    with torch.no_grad():
        said = torch.distributions.Categorical(logits=model(windows).logits[:, :-1].double())
    return float((-said.log_prob(windows[:, 1:]) - said.entropy()).mean())


def test_the_excess_is_that_of_the_whole_model(
    pycode: Path, held_out: Path, own: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = StreamedModel(Checkpoint(pycode), dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    code = windows_of(pycode, json.loads(held_out.read_text())[:8], 16, 64)
    shown = {"own": own, "code": code, "story": windows_of(pycode, [english(150)], 16, 64)}
    found = {name: domain.excess(streamed, windows, batch=4) for name, windows in shown.items()}
    for name, windows in shown.items():
        assert found[name] == pytest.approx(by_hand(whole, windows), abs=1e-3)
    assert abs(found["own"]) < 0.2
    assert found["code"] < domain.MOST < 2 * domain.MOST < found["story"]
    monkeypatch.setattr(domain, "CHUNK_BYTES", 4 * 1536 * 25)  # a window in three pieces
    assert domain.excess(streamed, code, batch=3) == pytest.approx(found["code"], abs=1e-5)
    monkeypatch.setattr(domain, "TOKENS", 150)
    assert domain.excess(streamed, code) == pytest.approx(by_hand(whole, code[[0, 7, 15]]), abs=1e-3)


# ---- runs: of a small random model that is sure of what it says, so that random tokens are not its kind of text


@pytest.fixture
def sure(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", "llama", tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def shown(folder: Path, tokens: Tensor, *, check: bool = True) -> pipeline.Calibration:
    path = folder.parent / "tokens.safetensors"
    save_file({"tokens": tokens}, path)
    return pipeline.Calibration(str(path), samples=len(tokens), batch=2, curvature=0, check=check)


def samples(folder: Path, count: int) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sampling.sample_windows(model, bos_token_id=model.config.bos_token_id, count=count, length=32, seed=0)


def noise(count: int) -> Tensor:
    return torch.randint(300, (count, 32), generator=torch.Generator().manual_seed(0))


def test_half_of_the_wrong_text_becomes_the_models_own(
    sure: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run that is cut and taken up again, too."""
    monkeypatch.setattr(logging.getLogger("llmquant"), "propagate", True)
    calibration = shown(sure, noise(5))
    manifest = quantize(sure, tmp_path / "whole", "int4:g16", calibration=calibration)
    fit = manifest["calibration_fit"]
    assert (fit["windows"], fit["own_windows"], fit["bound"]) == (5, 3, domain.MOST)
    assert fit["excess"] == pytest.approx(by_hand(AutoModelForCausalLM.from_pretrained(sure), noise(5)), abs=1e-3)
    assert "tokens.safetensors: is not the kind of text that the model was made for" in caplog.text
    assert "3 of 5 windows are the model's own samples instead" in caplog.text

    cut_after(sure, tmp_path / "cut", 2, "int4:g16", calibration=calibration)
    kept = load_file(tmp_path / "cut.partial" / CALIBRATION)
    assert kept["own"].tolist() == [True, False, True, False, True]
    assert torch.equal(kept["tokens"][1::2], noise(5)[1::2])
    assert torch.equal(kept["tokens"][::2], samples(sure, 3))
    quantize(sure, tmp_path / "cut", "int4:g16", calibration=calibration)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for said in (card.text(manifest), report.page(manifest)):
        assert "3 of 5 windows are the model" in said


def test_text_of_the_right_kind_and_unchecked_text_stay_as_they_are(sure: Path, tmp_path: Path) -> None:
    for tokens in (samples(sure, 4), noise(4)):
        found = []
        for check in (True, False):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            calibration = shown(sure, tokens, check=check)
            found.append((quantize(sure, folder, "int4:g16", calibration=calibration), contents(folder)))
        (checked, bytes_of_checked), (unchecked, bytes_of_unchecked) = found
        right = bool(checked["calibration_fit"]["own_windows"] == 0)
        assert right == (checked["calibration_fit"]["excess"] < domain.MOST) == torch.equal(tokens, samples(sure, 4))
        shards = [name for name in bytes_of_checked if name.endswith("tensors")]
        assert len(shards) == 4
        assert right == all(bytes_of_checked[name] == bytes_of_unchecked[name] for name in shards)
        assert "calibration_fit" not in unchecked
        assert "--no-calibration-check" in card.command(unchecked)
        assert "--no-calibration-check" not in card.command(checked)


def test_what_a_model_writes_by_itself_is_not_looked_at(sure: Path, tmp_path: Path) -> None:
    calibration = pipeline.Calibration("self", samples=4, length=32, batch=2, curvature=0)
    assert "calibration_fit" not in quantize(sure, tmp_path / "out", "int4:g16", calibration=calibration)


def test_without_room_for_the_models_samples_the_wrong_text_is_refused(
    sure: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pipeline.Job(str(sure), Recipe.uniform("int4:g16"), shown(sure, noise(4)))
    prepared = pipeline.prepare(job, tmp_path / "out")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**5, total=10**5))
    with pytest.raises(DataError, match=r"is not the kind of text .* need all of it in memory.*no-calibration-check"):
        pipeline.quantize(prepared, tmp_path / "out")


def test_a_model_without_finite_logits_is_refused(sure: Path) -> None:
    tensors = load_file(sure / "model.safetensors")
    tensors["lm_head.weight"][0] = torch.nan
    save_file(tensors, sure / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="logits are not finite"):
        domain.excess(StreamedModel(Checkpoint(sure)), noise(2))


def test_the_wrong_text_does_not_end_worse_than_none(pycode: Path, own: Tensor, tmp_path: Path) -> None:
    """Of the bundled model, nine matrices; judged on what the model writes."""
    reference = AutoModelForCausalLM.from_pretrained(pycode, dtype=torch.float32)
    story = windows_of(pycode, [english(150)], 16, 64)
    rules = Recipe.from_json([{"pattern": "*.[0-2].mlp.*", "format": "int2:g64"}, {"pattern": "*", "format": None}])

    def divergence(calibration: pipeline.Calibration | None) -> float:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        quantize(pycode, folder, rules, calibration=calibration)
        return metrics.divergence(reference, llmquant.load(folder, dtype=torch.float32), own).mean

    path = tmp_path / "model"
    wrong, mended = (divergence(shown(path, story, check=check)) for check in (False, True))
    assert mended < divergence(None) < wrong
