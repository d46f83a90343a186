"""Models that are no causal language models: encoders, vision, speech, convolutions. All are read block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import FAMILIES, VOCABULARY, make_checkpoint, make_family
from safetensors.torch import load_file, save_file
from test_pipeline import SMALL, contents, cut_after, dense_twin, quantize
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedModel

import llmquant
from llmquant import cli, formats, inspection, matrices, pipeline
from llmquant.errors import CheckpointError, PlanError
from llmquant.hf import swap
from llmquant.linear import QuantConv, QuantEmbedding, QuantLinear, QuantModule
from llmquant.matrices import CONVOLUTIONS, Target, all_blocks, target_of
from llmquant.recipe import Recipe, Rule

SPEC = "int4:g32"


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantModule)}


def assert_serves(name: str, model: Path, folder: Path) -> Any:
    """The folder, loaded as users do, computes what the dense model with the decoded weights computes."""
    family = FAMILIES[name]
    loaded = family.auto.from_pretrained(folder)
    assert type(loaded) is family.model
    expected = family.outputs(dense_twin(model, folder, family.model))
    for found, wanted in zip(family.outputs(loaded), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    original = family.outputs(family.model.from_pretrained(model))
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(original, expected, strict=True))
    return loaded


# ---- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_serves_the_decoded_weights(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = make_family(tmp_path / "model", name)
    manifest = quantize(model, tmp_path / "out", SPEC)
    names, kept = {tensor["name"] for tensor in manifest["tensors"]}, {kept["name"] for kept in manifest["kept_dense"]}
    assert (len(names), names >= set(family.some), kept >= set(family.dense)) == (family.quantized, True, True)
    assert inspection.verify(tmp_path / "out") == []
    loaded = assert_serves(name, model, tmp_path / "out")
    assert quantized_names(loaded) == names

    loaded.save_pretrained(tmp_path / "again")
    again = llmquant.load(tmp_path / "again")
    assert type(again) is family.model
    before, after = loaded.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, spec) for name in ("t5", "resnet") for spec in ("fp8_e4m3:channel", "mx6", "mxfp8_e4m3")),
        *(("t5", "kmeans3:channel"), ("whisper", "fp8_e4m3:channel")),
    ],
)
def test_formats_whose_tensor_is_called_weight_too(name: str, spec: str, tmp_path: Path) -> None:
    """T5 casts its activations to the type of `wo.weight`: that must be the type computed in, not the one stored."""
    model = make_family(tmp_path / "model", name)
    quantize(model, tmp_path / "out", spec)
    assert inspection.verify(tmp_path / "out") == []
    assert_serves(name, model, tmp_path / "out")


def test_the_plan_tells_all_beforehand(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "mobilenet")
    plan = pipeline.prepare(pipeline.Job(str(model), Recipe.uniform(SPEC), None), tmp_path / "out").plan
    manifest = quantize(model, tmp_path / "out", SPEC)
    shown = plan.to_json()
    assert [row["name"] for row in shown["tensors"]] == [tensor["name"] for tensor in manifest["tensors"]]
    assert shown["kept"] == manifest["kept_dense"]
    reasons = {kept.name: kept.reason for kept in plan.kept}
    assert reasons["mobilenet_v2.layer.3.conv_3x3.convolution"] == "group 32 is larger than a row of 9: use at most g9"
    assert reasons["classifier"].startswith("it lies outside the repeated blocks")
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan.bytes_after == pytest.approx(stored, rel=0.1)  # the rest is headers


@pytest.mark.parametrize("block", [1, 3])
def test_a_cut_run_ends_as_if_it_had_not_been_cut(block: int, tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "whisper")
    quantize(model, tmp_path / "whole", SPEC)
    cut_after(model, tmp_path / "cut", block, SPEC)
    assert len(list((tmp_path / "cut.partial").glob("*.safetensors"))) == block
    quantize(model, tmp_path / "cut", SPEC)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_older_names_of_tensors_and_unknown_ones(tmp_path: Path) -> None:
    """BERT was published with other names for its norms, and with a head that its class does not have."""
    model = make_family(tmp_path / "model", "bert")
    stored = load_file(model / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    assert old.keys() != stored.keys()
    old["cls.seq_relationship.weight"] = torch.ones(2, 64)
    save_file(old, model / "model.safetensors", {"format": "pt"})
    quantize(model, tmp_path / "out", SPEC)
    assert_serves("bert", model, tmp_path / "out")


def test_a_model_of_another_class_takes_what_it_shares(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "bert")
    quantize(model, tmp_path / "out", SPEC)
    body = transformers.BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    twin = dense_twin(model, tmp_path / "out", BertForMaskedLM)
    inputs = FAMILIES["bert"].inputs()
    with torch.no_grad():
        expected = twin.base_model(**inputs).last_hidden_state
        torch.testing.assert_close(body(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


# ---- rules


NAMED = {
    "vit": ("vit.embeddings.patch_embeddings.projection", "classifier"),
    "bert": ("cls.predictions.transform.dense",),
    "whisper": ("model.encoder.conv1", "model.encoder.conv2"),
    "wav2vec2": ("lm_head", "wav2vec2.feature_projection.projection"),
    "resnet": ("resnet.embedder.embedder.convolution",),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_full_name_in_a_rule_reaches_what_lies_outside_the_blocks(name: str, tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", name)
    rules = [Rule(module, "int8:channel") for module in NAMED[name]]
    quantize(model, tmp_path / "out", Recipe((*rules, Rule("*", SPEC))))
    loaded = assert_serves(name, model, tmp_path / "out")
    assert quantized_names(loaded) >= set(NAMED[name])


def test_the_head_of_a_language_model_by_its_name(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", tied=False)
    assert not quantize(model, tmp_path / "without", SPEC)["kept_dense"]
    quantize(model, tmp_path / "out", Recipe((Rule("lm_head", "int8:channel"), Rule("*", SPEC))))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.lm_head, QuantLinear)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense_twin(model, tmp_path / "out")(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    tied = make_checkpoint(tmp_path / "tied", "llama", tied=True)
    with pytest.raises(
        PlanError, match=r"lm_head shares its weight with model\.embed_tokens\.weight.*tie_word_embeddings"
    ):
        quantize(tied, tmp_path / "never", Recipe((Rule("lm_head", "int8:channel"), Rule("*", SPEC))))


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2"])
def test_head_and_embeddings_by_their_names(name: str, tmp_path: Path) -> None:
    """Gemma scales its embeddings, OPT adds to the ids of its positions: the module goes on doing so."""
    prefix = {"opt": "model.decoder.", "gpt2": "transformer."}.get(name, "model.")
    inner = {"opt": ["embed_tokens", "embed_positions"], "gpt2": ["wte", "wpe"]}.get(name, ["embed_tokens"])
    embeddings = [prefix + each for each in inner]
    model = make_checkpoint(tmp_path / "model", name, tied=False)
    rules = [Rule(each, spec) for each, spec in zip(embeddings, ("int8:g32:asym", "mx9"), strict=False)]
    recipe = Recipe((*rules, Rule("lm_head", "int8:g32"), Rule("*", "int4:g16")))
    manifest = quantize(model, tmp_path / "out", recipe, calibration=SMALL)
    facts = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    assert (facts["lm_head"]["solver"], facts["lm_head"]["tokens"]) == ("gptq", 3 * 32)
    assert {facts[each]["solver"] for each in embeddings} == {"rtn"}
    assert manifest["recoveries"] == []
    assert inspection.verify(tmp_path / "out") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {each for each, module in loaded.named_modules() if isinstance(module, QuantEmbedding)} == {*embeddings}
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = dense_twin(model, tmp_path / "out")(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(llmquant.load(tmp_path / "again")(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    "spec", ["int4:g16:asym", "nvfp4", "fp8_e4m3:channel", "mx6", "kmeans3:channel", "ternary:g16"]
)
def test_quant_embedding(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nn.Embedding(50, 48, padding_idx=3)
    fmt = formats.get(spec).stored_for(torch.float32)
    codes, grid = fmt.quantize(dense.weight.detach())
    expected = nn.Embedding(50, 48, padding_idx=3, _weight=fmt.decode(codes, grid))
    embedding = QuantEmbedding(fmt, dense)
    embedding.load_state_dict(fmt.pack(codes, grid))
    ids = torch.tensor([[7, 3, 7], [49, 0, 7]])
    torch.testing.assert_close(embedding(ids), expected(ids), rtol=1e-6, atol=1e-6)
    assert embedding(ids[:0]).shape == (0, 3, 48)
    assert (embedding.padding_idx, embedding.num_embeddings, embedding.weight.shape) == (3, 50, (50, 48))
    x = torch.randn(2, 48)
    torch.testing.assert_close(x @ embedding.weight.T, x @ expected.weight.T, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(QuantEmbedding, "dequantize", lambda *args: pytest.fail("all of it was decoded"))
    assert embedding.bfloat16()(ids).dtype == torch.bfloat16
    with pytest.raises(PlanError, match="max_norm"):
        QuantEmbedding(fmt, nn.Embedding(50, 48, max_norm=1.0))


def test_a_rule_that_names_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "mobilenet")
    name = "mobilenet_v2.layer.3.conv_3x3.convolution"
    with pytest.raises(PlanError, match=rf"{name} \(\d+, 9\): group 32 is larger than a row of 9"):
        quantize(model, tmp_path / "out", Recipe((Rule(name, SPEC), Rule("*", SPEC))))
    with pytest.raises(PlanError, match=r"nothing is left to quantize: .* such as .* is larger than a row"):
        quantize(model, tmp_path / "out", "int4:g2048")
    speech = make_family(tmp_path / "speech", "wav2vec2")
    with pytest.raises(PlanError, match=r"'\*head' matches no module"):
        quantize(speech, tmp_path / "out", Recipe((Rule("*head", SPEC), Rule("*", SPEC))))


# ---- refusals


def test_calibration_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_family(tmp_path / "model", "bert")

    def run(*arguments: str) -> tuple[int, str]:
        out = ["--output", str(tmp_path / "out"), "--group", "32"]
        monkeypatch.setattr("sys.argv", ["llmquant", "quantize", str(model), *out, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    code, said = run()
    assert (code, "BertForMaskedLM is no causal language model" in said, "--quality fast" in said) == (4, True, True)
    code, said = run("--quality", "fast", "--eval", "text.txt")
    assert (code, "--eval measures causal language models only" in said) == (4, True)
    assert run("--quality", "fast", "--dry-run")[0] == 0
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_named_with_a_remedy(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "wav2vec2")
    stored = load_file(model / "model.safetensors")
    del stored["wav2vec2.masked_spec_embed"]
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"masked_spec_embed: missing; .* save_pretrained of the loaded model adds them"
    ):
        quantize(model, tmp_path / "out", SPEC)


def test_an_encoder_of_no_named_class_is_refused(tmp_path: Path) -> None:
    model = make_family(tmp_path / "model", "bert")
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"'bert' is not a causal language model.*\"architectures\""):
        quantize(model, tmp_path / "out", SPEC)


# ---- models of odd shapes


class Listless(PreTrainedModel):
    """No lists: the model is one block, of which the ends stay dense."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(3, 32, 3)
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ConvTranspose2d(32, 32, 2), nn.Conv2d(32, 64, 1))
        self.head = nn.Linear(64, 5)
        self.post_init()


def test_a_model_without_lists_is_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(matrices)["transformers"].__dict__, "Listless", Listless)
    Listless(BertConfig()).save_pretrained(tmp_path / "model")
    manifest = quantize(tmp_path / "model", tmp_path / "out", SPEC)
    assert [tensor["name"] for tensor in manifest["tensors"]] == ["body.0", "body.2"]
    assert [kept["name"] for kept in manifest["kept_dense"]] == ["stem", "head", "body.1.weight"]
    assert quantized_names(llmquant.load(tmp_path / "out")) == {"body.0", "body.2"}


def test_blocks_are_the_members_of_all_outermost_lists() -> None:
    def layer() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(2, 2), "inner": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})

    shared = layer()
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"layers": nn.ModuleList([layer(), layer(), nn.LayerNorm(2)])}),
            "decoder": nn.ModuleList([shared, nn.Linear(2, 2), shared]),
            "heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
            "norms": nn.ModuleList([nn.Sequential(nn.LayerNorm(2))]),
        }
    )
    assert list(all_blocks(model)) == ["encoder.layers.0", "encoder.layers.1", "decoder.0"]
    heads = model.get_submodule("heads")
    assert all_blocks(heads) == {"": heads}


def test_what_is_no_target() -> None:
    class Padded(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (2, 0)))

    modules = [nn.LayerNorm(8), nn.ConvTranspose1d(4, 4, 3), Padded(4, 4, 3), nn.GRU(4, 4)]
    modules += [weight_norm(nn.Conv1d(4, 4, 3)), weight_norm(nn.Linear(4, 4))]
    assert [target_of("", module) for module in modules] == [None] * len(modules)
    named = {"int4:g4": formats.get("int4:g4")}
    model = FAMILIES["bert"].model(FAMILIES["bert"].config())
    for module in modules[1:]:  # an embedding has a counterpart of its own
        model.extra = module
        with pytest.raises(CheckpointError, match=r"extra cannot be .* no linear layer and no plain convolution"):
            swap(model, {"extra": named["int4:g4"]})


# ---- the modules

Dense = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: dict[str, Callable[[], Dense]] = {
    "1d": lambda: nn.Conv1d(8, 12, 5, stride=2, padding=2),
    "2d": lambda: nn.Conv2d(8, 12, (3, 1), stride=(2, 1), padding=(0, 1), dilation=(2, 1), bias=False),
    "3d": lambda: nn.Conv3d(8, 12, 2, padding=1),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4, padding="same"),
    "depthwise": lambda: nn.Conv1d(8, 16, 9, groups=8, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 12, (3, 5), padding=(1, 2), padding_mode="reflect"),
    "circular": lambda: nn.Conv1d(8, 12, 3, padding="same", padding_mode="circular"),
    "replicate": lambda: nn.Conv3d(8, 12, 3, padding=1, padding_mode="replicate", stride=2),
}


def quant_conv(dense: Dense, spec: str = "int4:g8") -> QuantConv:
    """Stands for `dense`, which takes the decoded weight."""
    target = target_of("conv", dense)
    assert target is not None
    fmt = formats.get(spec).stored_for(torch.float32)
    codes, grid = fmt.quantize(target.matrix(dense).detach())
    dense.weight.data = target.stored(fmt.decode(codes, grid)).clone()
    conv = QuantConv(fmt, dense)
    conv.load_state_dict({**fmt.pack(codes, grid), **({} if dense.bias is None else {"bias": dense.bias.data})})
    return conv


@torch.no_grad()
@pytest.mark.parametrize("kind", CONVS)
def test_quant_conv(kind: str) -> None:
    torch.manual_seed(0)
    dense = CONVS[kind]()
    conv = quant_conv(dense)
    x = torch.randn(2, 8, *[9] * len(dense.kernel_size))
    expected = dense(x)
    torch.testing.assert_close(conv(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conv(x[0]), expected[0], rtol=1e-5, atol=1e-6)  # without a batch
    assert torch.equal(conv.weight, dense.weight)
    conv.keep_decoded = True
    assert torch.equal(conv(x), conv(x))
    half = conv.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == half.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
    assert isinstance(dense, CONVOLUTIONS)
    assert "decoded" in conv.explain(torch.float32)
    assert "int4:g8" in str(conv)


def test_a_convolution_is_seen_as_a_matrix() -> None:
    dense = nn.Conv2d(8, 12, (3, 5), groups=2)
    target = target_of("conv", dense)
    assert target == Target("conv", (12, 4 * 3 * 5), transposed=False, bias=True, kernel=(3, 5))
    matrix = torch.arange(12 * 60.0).view(12, 60)
    dense.weight.data = target.stored(matrix)
    assert dense.weight.shape == (12, 4, 3, 5)
    assert torch.equal(target.matrix(dense), matrix)


def quant_linear(dense: nn.Linear) -> QuantLinear:
    """Stands for `dense`, which takes the decoded weight."""
    fmt = formats.get(SPEC).stored_for(torch.float32)
    codes, grid = fmt.quantize(dense.weight.detach())
    dense.weight.data = fmt.decode(codes, grid)
    linear = QuantLinear(fmt, dense.in_features, dense.out_features, bias=True)
    linear.load_state_dict({**fmt.pack(codes, grid), "bias": dense.bias.data})
    return linear


def test_reading_the_type_of_a_weight_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = quant_linear(nn.Linear(32, 64))
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *args: pytest.fail("decoded"))
    weight = linear.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.shape, weight.device) == (torch.float32, (64, 32), torch.device("cpu"))
    assert linear.half().weight.dtype == torch.float16
    assert "weight" not in dict(linear.named_parameters()) | linear.state_dict()
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        linear.weights  # noqa: B018


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_may_be_computed_with(training: bool) -> None:
    """torch's own attention does not call its output layer, it takes the weight."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True).train(training)
    x = torch.randn(2, 5, 32)
    assert isinstance(attention.out_proj, nn.Linear)
    swapped = quant_linear(attention.out_proj)
    expected = attention(x, x, x)[0]
    attention.out_proj = swapped  # type: ignore[assignment]
    torch.testing.assert_close(attention(x, x, x)[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected, rtol=1e-5, atol=1e-6)
