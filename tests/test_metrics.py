"""Perplexity, divergence and size, against loops in float64 that share no code with them."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmquant import metrics, sampling, text
from llmquant.errors import CheckpointError, DataError, VerificationError

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
STORIES_TEXT = ROOT.parent / "shared" / "text" / "tinystories_clean.json"
VOCABULARY = 40


def tiny(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def near(model: LlamaForCausalLM, amount: float = 0.1) -> LlamaForCausalLM:
    """A copy of a model, its weights changed a little."""
    copy = type(model)(model.config).eval()
    generator = torch.Generator().manual_seed(9)
    changed = {k: v + amount * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    copy.load_state_dict(changed)
    return copy


def tokens(count: int = 7, length: int = 11, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


def log_probabilities(model: LlamaForCausalLM, window: Tensor, vocabulary: int) -> np.ndarray:
    """(length - 1, vocabulary) float64, one window alone."""
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1, :vocabulary].double().numpy()
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest of the sorted values."""
    values = sorted(values)
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


# ---- perplexity


@pytest.mark.parametrize("vocabulary", [None, 30])
def test_perplexity_is_exp_of_the_mean_of_the_windows_cross_entropy(vocabulary: int | None) -> None:
    model, windows = tiny(), tokens(vocabulary=vocabulary or VOCABULARY)
    expected = []
    for window in windows:
        log_p = log_probabilities(model, window, vocabulary or VOCABULARY)
        expected.append(sum(-log_p[i, window[i + 1]] for i in range(10)) / 10)
    mean = sum(expected) / 7
    spread = math.sqrt(sum((nll - mean) ** 2 for nll in expected) / 6)

    found = metrics.perplexity(model, windows, vocabulary=vocabulary)
    assert found.window_nll == pytest.approx(expected, rel=1e-6)
    assert found.nll == pytest.approx(mean, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.standard_error == pytest.approx(spread / math.sqrt(7), rel=1e-5)
    assert found.tokens == 70


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary() -> None:
    model = tiny()
    model.lm_head.weight.data.zero_()
    assert metrics.perplexity(model, tokens()).perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert metrics.perplexity(model, tokens(vocabulary=30), vocabulary=30).perplexity == pytest.approx(30, rel=1e-6)


def test_neither_batch_nor_pieces_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, windows = tiny(), near(tiny()), tokens()
    told: list[int] = []

    def tell(done: int, total: int) -> None:
        told.extend((done, total))

    whole = metrics.divergence(model, other, windows, batch=3, progress=tell)
    assert told == [3, 7, 6, 7, 7, 7]
    perplexity = metrics.perplexity(other, windows, batch=7)
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 3 * 4 * VOCABULARY)  # three positions
    pieces = metrics.divergence(model, other, windows, batch=1)
    assert pieces.window_means == pytest.approx(whole.window_means, rel=1e-4)
    assert pieces.maximum == pytest.approx(whole.maximum, rel=1e-4)
    assert pieces.top1_agreement == whole.top1_agreement
    assert pieces.model.window_nll == pytest.approx(perplexity.window_nll, rel=1e-5)
    assert metrics.perplexity(other, windows, batch=2).window_nll == pytest.approx(perplexity.window_nll, rel=1e-5)


def test_batches_are_as_large_as_memory_bears() -> None:
    def batch(length: int, vocabulary: int) -> int:
        return metrics._batch_size(torch.empty(1, length), vocabulary)

    assert batch(512, 32000) == 8  # 524 MB
    assert batch(2048, 152000) == 1  # never less than one
    assert batch(512, 512) == 16  # 8192 tokens


def test_one_window_has_no_standard_error_and_infinity_is_no_failure() -> None:
    assert metrics.perplexity(tiny(), tokens(1)).standard_error is None
    assert metrics.Perplexity((1000.0,), 1).perplexity == math.inf


# ---- divergence


@pytest.mark.parametrize("vocabulary", [None, 30])
def test_divergence_agrees_with_loops_in_float64(vocabulary: int | None) -> None:
    size = vocabulary or VOCABULARY
    reference, windows = tiny(), tokens(vocabulary=size)
    model = near(reference)
    kl, agree, squares, means = [], 0, 0.0, []
    for window in windows:
        log_p, log_q = (log_probabilities(m, window, size) for m in (reference, model))
        for i in range(10):
            kl.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p[i], log_q[i], strict=True)))
            likeliest_p, likeliest_q = (row.tolist().index(max(row)) for row in (log_p[i], log_q[i]))
            agree += likeliest_p == likeliest_q
            target = window[i + 1]
            squares += (math.exp(log_q[i, target]) - math.exp(log_p[i, target])) ** 2
        means.append(sum(kl[-10:]) / 10)
    mean = sum(kl) / 70
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 6)

    found = metrics.divergence(reference, model, windows, vocabulary=vocabulary)
    assert found.mean == pytest.approx(mean, rel=1e-5)
    assert found.window_means == pytest.approx(means, rel=1e-5)
    assert found.standard_error == pytest.approx(spread / math.sqrt(7), rel=1e-4)
    assert found.median == pytest.approx(quantile(kl, 0.5), rel=1e-4)
    assert found.percentile_99 == pytest.approx(quantile(kl, 0.99), rel=1e-4)
    assert found.percentile_99_9 == pytest.approx(quantile(kl, 0.999), rel=1e-4)
    assert found.maximum == pytest.approx(max(kl), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agree / 70)
    assert 0 < found.top1_agreement < 1
    assert found.rms_probability_change == pytest.approx(math.sqrt(squares / 70), rel=1e-4)
    assert found.tokens == 70
    before, after = (metrics.perplexity(m, windows, vocabulary=vocabulary) for m in (reference, model))
    assert found.reference.window_nll == pytest.approx(before.window_nll, rel=1e-6)
    assert found.model.window_nll == pytest.approx(after.window_nll, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(after.perplexity / before.perplexity, rel=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny()
    found = metrics.divergence(model, model, tokens())
    assert (found.mean, found.maximum, found.rms_probability_change) == (0, 0, 0)
    assert (found.top1_agreement, found.perplexity_ratio, found.perplexity_ratio_error) == (1, 1, 0)


def test_of_equal_logits_the_lowest_token_counts_as_the_likeliest() -> None:
    undecided, model, windows = tiny(), tiny(), tokens()
    undecided.lm_head.weight.data.zero_()
    with torch.no_grad():
        lowest = model(input_ids=windows).logits[:, :-1].argmax(-1) == 0
    assert metrics.divergence(undecided, undecided, windows).top1_agreement == 1
    found = metrics.divergence(undecided, model, windows)
    assert found.top1_agreement == pytest.approx(lowest.float().mean().item())


def test_padding_of_either_head_is_left_out() -> None:
    model, windows = tiny(), tokens()
    padded = tiny()
    padded.resize_token_embeddings(VOCABULARY + 24, mean_resizing=False)
    padded.lm_head.weight.data[VOCABULARY:] = torch.inf  # what lies there must not matter
    for pair in ((model, padded), (padded, model)):
        found = metrics.divergence(*pair, windows)
        assert found.mean == pytest.approx(0, abs=1e-6)
        assert found.top1_agreement == 1
    plain = metrics.perplexity(model, windows)
    assert metrics.perplexity(padded, windows, vocabulary=VOCABULARY).nll == pytest.approx(plain.nll, rel=1e-6)


def test_half_precision_logits_are_compared_in_float32() -> None:
    reference = tiny()
    model = tiny().to(torch.bfloat16)
    found = metrics.divergence(reference, model, tokens())
    assert 0 < found.mean < 0.05


def test_evaluation_leaves_the_mode_alone() -> None:
    reference, model = tiny(attention_dropout=0.5).train(), tiny()
    assert metrics.divergence(reference, model, tokens()).mean == pytest.approx(0, abs=1e-6)
    assert reference.training
    assert not model.training


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused_by_window(value: float) -> None:
    windows = tokens()
    windows[windows == 5] = 6
    windows[4, 8] = 5
    model, damaged = tiny(), tiny()
    damaged.model.embed_tokens.weight.data[5] = value
    with pytest.raises(VerificationError, match="window 4: the model gives"):
        metrics.perplexity(damaged, windows)
    with pytest.raises(VerificationError, match="window 4: the model gives"):
        metrics.divergence(model, damaged, windows)
    with pytest.raises(VerificationError, match="window 4: the reference gives"):
        metrics.divergence(damaged, model, windows, batch=2)


def test_windows_that_cannot_be_evaluated_are_refused() -> None:
    model = tiny()
    with pytest.raises(DataError, match="token 40 is outside the vocabulary of 40"):
        metrics.perplexity(model, torch.tensor([[1, 40]]))
    with pytest.raises(DataError, match="token 30 is outside the vocabulary of 30"):
        metrics.divergence(model, model, torch.tensor([[1, 30]]), vocabulary=30)
    with pytest.raises(DataError, match="token -1"):
        metrics.perplexity(model, torch.tensor([[-1, 3]]))
    for shape in ((0, 4), (3, 1), (3,)):
        with pytest.raises(DataError, match="windows of shape"):
            metrics.perplexity(model, torch.zeros(shape, dtype=torch.int64))


def test_results_are_json() -> None:
    model, windows = tiny(), tokens()
    found = metrics.divergence(model, near(model), windows)
    back = json.loads(json.dumps(found.to_dict()))
    assert back["kl_mean"] == found.mean
    assert back["model"] == metrics.Perplexity(found.model.window_nll, 70).to_dict()
    assert back["model"]["windows"] == 7


@pytest.mark.skipif(not (STORIES.is_dir() and STORIES_TEXT.is_file()), reason="the trained model is not at hand")
def test_a_trained_model_has_its_known_perplexity() -> None:
    """128 windows of 512, spread over the later stories: 4.231 has been measured on them by another program."""
    tokenizer = text.load_tokenizer(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    stories = text.read_documents(str(STORIES_TEXT))[329:]
    stream = text.token_stream(tokenizer, stories, protocol="documents")
    windows = text.windows(stream, text.window_length(model.config))
    windows = windows[torch.linspace(0, len(windows) - 1, 128, dtype=torch.float64).long()]
    assert metrics.perplexity(model, windows).perplexity == pytest.approx(4.231, abs=0.0005)

    samples = sampling.sample_windows(model, bos_token_id=1, count=16, length=64, seed=0)
    assert metrics.perplexity(model, samples).nll < 2  # it finds its own text likely: ln 512 is 6.2
    assert "Once upon a time" in tokenizer.batch_decode(samples)[0]


# ---- size


def folder_with(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def quantized_tensors() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One 6 x 40 matrix at 4 bits in groups of 16 with zero points, one 8 x 8 stored unpacked, the rest bfloat16."""
    tensors = {
        "model.embed.weight": torch.zeros(10, 8, dtype=torch.bfloat16),
        "model.a.weight_packed": torch.zeros(6, 6, dtype=torch.int32),
        "model.a.weight_scale": torch.zeros(6, 3, dtype=torch.bfloat16),
        "model.a.weight_zero_point": torch.zeros(1, 3, dtype=torch.int32),
        "model.a.weight_shape": torch.tensor([6, 40]),
        "model.a.bias": torch.zeros(6, dtype=torch.bfloat16),
        "model.ab.weight": torch.zeros(5, dtype=torch.bfloat16),
        "model.b.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn),
        "model.b.weight_scale": torch.zeros(8, 1),
        "model.mask": torch.zeros(99, dtype=torch.bool),
    }
    formats = {"int4:g16:asym": ["model.a"], "fp8_e4m3:channel": ["model.b"]}
    return tensors, {"quantization_config": {"quant_method": "llmquant", "formats": formats}}


def test_size_of_a_quantized_folder_counts_every_byte(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, *quantized_tensors())
    found = metrics.stored_size(folder)
    packed = 6 * 6 * 4 + 6 * 3 * 2 + 3 * 4 + 2 * 8
    plain = 64 + 8 * 4
    assert found.quantized_weights == 240 + 64
    assert found.quantized_bytes == packed + plain
    assert found.bits_per_weight == 8 * (packed + plain) / 304
    assert found.parameters == 304 + 80 + 6 + 5
    assert found.parameter_bytes == packed + plain + 2 * (80 + 6 + 5)
    assert found.bits_per_parameter == 8 * found.parameter_bytes / found.parameters
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert json.loads(json.dumps(found.to_dict()))["bits_per_weight"] == found.bits_per_weight


def test_size_of_a_dense_folder(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    found = metrics.stored_size(tmp_path)
    assert found.bits_per_weight is None
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bits_per_parameter == 32


def test_a_tied_head_counts_once_even_where_it_is_stored_twice(tmp_path: Path) -> None:
    tensors = {"model.embed.weight": torch.zeros(4, 3), "lm_head.weight": torch.zeros(4, 3)}
    assert metrics.stored_size(folder_with(tmp_path / "a", tensors, {"tie_word_embeddings": True})).parameters == 12
    assert metrics.stored_size(folder_with(tmp_path / "b", tensors, {"tie_word_embeddings": False})).parameters == 24


def test_a_size_that_is_not_known_is_refused(tmp_path: Path) -> None:
    tensors, config = quantized_tensors()
    del tensors["model.a.weight_shape"], tensors["model.a.weight_packed"]
    with pytest.raises(CheckpointError, match=r"model\.a is listed as quantized"):
        metrics.stored_size(folder_with(tmp_path, tensors, config))
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(CheckpointError, match="quantized by gptq"):
        metrics.stored_size(folder_with(tmp_path, tensors, config))


# ---- the scripts


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<bos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    (folder / "text.txt").write_text("It was a dark and stormy night. " * 8)
    return folder


def run_script(name: str, *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> dict[str, Any]:
    """main() of a script in eval/; the JSON of its last line."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(f"eval_{name}", ROOT / "eval" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    captured = capsys.readouterr()
    assert "%|" not in captured.err  # no bars but our own
    return json.loads(captured.out.splitlines()[-1])


def test_the_perplexity_script(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ["--text", model_folder / "text.txt", "--device", "cpu"]
    found = run_script("perplexity", model_folder, *source, capsys=capsys, monkeypatch=monkeypatch)
    (row,) = found["results"]
    assert 200 < row["perplexity"] < 320
    assert (row["window"], row["tokens"], row["begins_with_bos"]) == (32, 8 * 31, True)
    assert row["size"]["bits_per_parameter"] == 32


def test_the_divergence_script(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--reference", model_folder, "--text", model_folder / "text.txt", "--window", 16, "--max-windows", 3]
    found = run_script("divergence", model_folder, *options, "--device", "cpu", capsys=capsys, monkeypatch=monkeypatch)
    (row,) = found["results"]
    assert row["name"] == str(model_folder)
    assert (row["kl_mean"], row["top1_agreement"], row["tokens"]) == (0, 1, 45)


def test_the_speed_script(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--reference", model_folder, "--prompt-tokens", 8, "--new-tokens", 4, "--batch", 2, "--runs", 3]
    found = run_script("speed", model_folder, *options, "--device", "cpu", capsys=capsys, monkeypatch=monkeypatch)
    assert [len(row["runs"]) for row in found["results"]] == [3, 3]
    assert found["ratio"]["decode"] > 0
