"""Loading and saving quantized folders through transformers, and refusing damaged ones."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES, MOE, VOCABULARY, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import llmquant
from llmquant import formats
from llmquant.errors import CheckpointError, LlmquantError, PlanError, VerificationError
from llmquant.hf import LlmquantConfig, register
from llmquant.linear import QuantLinear

TOKENS = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
Choose = Callable[[str], str | None]


class Folders(NamedTuple):
    """A quantized model, the dense one with the weights that it stands for, and the names of the quantized layers."""

    quantized: Path
    dense: Path
    names: list[str]


def everything(spec: str) -> Choose:
    return lambda name: None if "head" in name else spec


def assorted(name: str) -> str | None:
    """Several formats in one model, one layer of it dense."""
    if "head" in name or "layers.1." in name or ".h.1." in name:
        return None
    kinds = ["int4:g32:fp32", "int8:channel:bf16", "int3:g48:asym:fp32", "int5:tensor:fp32", "int2:g16:asym_float:fp16"]
    return kinds[sum(map(ord, name)) % len(kinds)]


def quantize_folder(source: Path, target: Path, choose: Choose) -> Folders:
    """Round every linear layer of `source` to the format that `choose` names for it, and write both folders."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        weights |= load_file(file)
    stored, dense, listed = dict(weights), dict(weights), dict[str, list[str]]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or (spec := choose(name)) is None:
            continue
        fmt = formats.get(spec)
        transposed = isinstance(module, Conv1D)
        w = weights[f"{name}.weight"].float()
        codes, grid = fmt.quantize(w.T.contiguous() if transposed else w)
        decoded = fmt.decode(codes, grid)
        dense[f"{name}.weight"] = decoded.T.contiguous() if transposed else decoded
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{suffix}": tensor for suffix, tensor in fmt.pack(codes, grid).items()}
        listed.setdefault(spec, []).append(name)
    config = json.loads((source / "config.json").read_text())
    write_folder(target / "dense", dense, config)
    config["quantization_config"] = {"quant_method": "llmquant", "version": "0.0.1", "formats": listed}
    write_folder(target / "quantized", stored, config)
    return Folders(target / "quantized", target / "dense", [name for names in listed.values() for name in names])


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folders]:
    """make(architecture, choose, **options of make_checkpoint) -> Folders."""

    def make(name: str, choose: Choose, **options: Any) -> Folders:
        folder = tmp_path_factory.mktemp(name)
        return quantize_folder(make_checkpoint(folder / "source", name, **options), folder, choose)

    return make


@pytest.fixture(scope="session")
def llama(make: Callable[..., Folders]) -> Folders:
    return make("llama", assorted, tied=False, dtype=torch.bfloat16)


@pytest.fixture
def damaged(llama: Folders, tmp_path: Path) -> Callable[..., Path]:
    """damaged(change): a copy of the llama folder after change(tensors), or after change(tensors, config)."""

    def damaged(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Path:
        tensors = load_file(llama.quantized / "model.safetensors")
        config = json.loads((llama.quantized / "config.json").read_text())
        change(tensors, config)
        write_folder(tmp_path / "damaged", tensors, config)
        return tmp_path / "damaged"

    return damaged


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits.float()


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All buffers of the quantized layers."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {f"{name}.{suffix}": t for name, layer in layers.items() for suffix, t in layer.named_buffers()}


def assert_as_in_file(model: nn.Module, folder: Path) -> None:
    """Every buffer has the very bits and type of the file."""
    saved: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        saved |= load_file(file)
    found = stored_tensors(model)
    assert found
    for name, tensor in found.items():
        assert tensor.dtype == saved[name].dtype, name
        assert torch.equal(tensor.cpu(), saved[name]), name


def assert_serves(folders: Folders, tolerance: float = 1e-5, **options: Any) -> Any:
    model, reference = load(folders.quantized, **options), load(folders.dense, **options)
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers == set(folders.names)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=tolerance)
    return model


# ---- what is loaded computes what the dense model does


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str, make: Callable[..., Folders]) -> None:
    assert_serves(make(name, assorted))


@pytest.mark.parametrize("name", MOE)
def test_experts_may_stay_dense(name: str, make: Callable[..., Folders]) -> None:
    """They are renamed and merged while loading, and cast all the same."""
    folders = make(name, lambda module: "int4:g16:bf16" if "attn" in module else None, dtype=torch.bfloat16)
    exact = 5e-4 if name == "qwen3_next" else 1e-5  # whose state makes a lot of what products are rounded by
    for dtype in (torch.float32, torch.float16):
        model = assert_serves(folders, exact if dtype == torch.float32 else 0.05, dtype=dtype)
        kept = {name: p.dtype for name, p in load(folders.dense, dtype=dtype).named_parameters()}
        assert {name: p.dtype for name, p in model.named_parameters()}.items() <= kept.items()


@pytest.mark.parametrize(
    "spec",
    [
        "int4:g32:fp32",
        "int4:g48:fp16",  # ragged: 64 = 48 + 16, 172 = 3 * 48 + 28
        "int3:g48:asym:bf16",
        "int8:channel:bf16",
        "int8:tensor",
        "int5:channel:asym:fp32",
        "int2:tensor:asym:fp32",
        "int4:g64:asym_float:fp16",
        "int4:tensor:asym_float:fp32",
        "int6:g64:sym_gptq",
        "int7:g20:sym:fp32",
    ],
)
def test_every_kind_of_grid(spec: str, make: Callable[..., Folders]) -> None:
    model = assert_serves(make("llama", everything(spec), intermediate_size=172, num_hidden_layers=1))
    assert model.get_submodule("model.layers.0.mlp.up_proj").format == formats.get(spec)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "options"), [("llama", {"attention_bias": True}), ("qwen2", {}), ("gpt2", {})])
def test_tied_and_untied_with_and_without_biases(
    tied: bool, name: str, options: dict[str, Any], make: Callable[..., Folders]
) -> None:
    model = assert_serves(make(name, everything("int4:g32"), tied=tied, **options))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert any(layer.bias is not None for layer in layers)


def test_a_quantized_head(make: Callable[..., Folders]) -> None:
    model = assert_serves(make("llama", lambda name: "int8:g32:fp32", tied=False))
    assert isinstance(model.lm_head, QuantLinear)


@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_leaves_the_stored_scales_alone(checkpoint: torch.dtype, make: Callable[..., Folders]) -> None:
    folders = make("qwen2", assorted, dtype=checkpoint)
    exact = logits(load(folders.dense, dtype=torch.float32))
    for dtype in (None, "auto", torch.float32, torch.bfloat16, torch.float16):
        options = {} if dtype is None else {"dtype": dtype}
        model, reference = load(folders.quantized, **options), load(folders.dense, **options)
        expected = dtype if isinstance(dtype, torch.dtype) else checkpoint
        assert {p.dtype for p in model.parameters()} == {expected} == {model.dtype}
        assert_as_in_file(model, folders.quantized)
        # In 16 bits the two round in other places: as far from the exact logits as the dense model is.
        allowed = 1e-5 if expected == torch.float32 else 2 * (logits(reference) - exact).abs().max().item()
        assert (logits(model) - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_layer_kept_in_float32_keeps_its_scales(
    dtype: torch.dtype, llama: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["mlp"])
    model = load(llama.quantized, dtype=dtype)
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float32  # a dense one
    assert_as_in_file(model, llama.quantized)


def test_generate(llama: Folders) -> None:
    prompt, options = TOKENS[:1, :6], {"max_new_tokens": 12, "do_sample": False}
    expected = load(llama.dense, dtype=torch.float32).generate(prompt, **options)
    assert torch.equal(llmquant.load(llama.quantized, dtype=torch.float32).generate(prompt, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_base_model_alone(name: str, dtype: torch.dtype, make: Callable[..., Folders], tmp_path: Path) -> None:
    """AutoModel has no head and other names; what it saves loads again."""
    folders = make(name, assorted, dtype=torch.bfloat16)
    model = AutoModel.from_pretrained(folders.quantized, dtype=dtype)
    whole = load(folders.quantized, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        expected = whole.base_model(TOKENS).last_hidden_state
        assert torch.equal(model(TOKENS).last_hidden_state, expected)
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert_as_in_file(again, tmp_path)
        assert torch.equal(again(TOKENS).last_hidden_state, expected)


def test_a_head_left_out_takes_its_quantized_weight_along(make: Callable[..., Folders]) -> None:
    folders = make("llama", everything("int4:g32"), tied=False)
    config = json.loads((folders.quantized / "config.json").read_text())
    config["quantization_config"]["formats"]["int8:g32"] = ["lm_head"]
    (folders.quantized / "config.json").write_text(json.dumps(config))
    assert isinstance(AutoModel.from_pretrained(folders.quantized).layers[0].mlp.up_proj, QuantLinear)


# ---- saving


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_save_and_load_again(name: str, shards: str, make: Callable[..., Folders], tmp_path: Path) -> None:
    folders = make(name, assorted, dtype=torch.bfloat16)
    config = json.loads((folders.quantized / "config.json").read_text())
    config["quantization_config"]["from_the_future"] = {"a": [1]}
    (folders.quantized / "config.json").write_text(json.dumps(config))
    model = load(folders.quantized)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "40KB")
    saved: dict[str, Tensor] = {}
    for file in files:
        saved |= load_file(file)
    original = load_file(folders.quantized / "model.safetensors")
    assert saved.keys() == original.keys()
    for key, tensor in original.items():
        assert saved[key].dtype == tensor.dtype
        assert torch.equal(saved[key], tensor), key
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == config["quantization_config"]
    again = load(tmp_path)
    assert_as_in_file(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# ---- devices

HALF_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("where", ["auto", "cpu", {"": "cpu"}, {"": "disk"}, HALF_ON_DISK])
@pytest.mark.parametrize("tied", [False, True])
def test_device_maps(
    where: str | dict[str, str], buffers: bool, tied: bool, make: Callable[..., Folders], tmp_path: Path
) -> None:
    folders = make("llama", assorted, tied=tied, attention_bias=True)
    model = load(folders.quantized, device_map=where, offload_folder=tmp_path, offload_buffers=buffers)
    expected = logits(load(folders.quantized))
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert all(not layer._prepared for layer in offloaded(model))


def test_saving_an_offloaded_model(make: Callable[..., Folders], tmp_path: Path) -> None:
    folders = make("llama", assorted, tied=False)
    options: dict[str, Any] = {"device_map": HALF_ON_DISK, "offload_folder": tmp_path / "offload"}
    model = load(folders.quantized, offload_buffers=True, **options)
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_as_in_file(again, folders.quantized)
    assert torch.equal(logits(again), logits(model))


def offloaded(model: nn.Module) -> list[QuantLinear]:
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return [layer for layer in layers if layer.weight_packed.is_meta]


# ---- the module


def test_casting_changes_the_bias_alone(make: Callable[..., Folders]) -> None:
    folders = make("qwen2", assorted)
    model = load(folders.quantized)
    before = logits(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_as_in_file(model, folders.quantized)
    assert (logits(model) - before).abs().max() < 0.1 * before.abs().max()
    layer = model.model.layers[0].self_attn.q_proj
    for cast in (layer.half, layer.float, layer.double, layer.bfloat16):
        cast()
        assert_as_in_file(model, folders.quantized)
    assert layer.bias.dtype == torch.bfloat16
    layer.to("meta")
    assert all(tensor.is_meta for tensor in (layer.bias, *layer.buffers()))


def test_copies_share_nothing(llama: Folders) -> None:
    model = load(llama.quantized, dtype=torch.float32)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert not any(module._prepared for module in twin.modules() if isinstance(module, QuantLinear))
    for tensor in stored_tensors(twin).values():
        tensor.zero_()
    assert logits(twin).abs().max() != before.abs().max()
    assert torch.equal(logits(model), before)


def quant_linear(spec: str = "int4:g32", shape: tuple[int, int] = (24, 72), bias: bool = True) -> QuantLinear:
    fmt = formats.get(spec)
    layer = QuantLinear(fmt, shape[1], shape[0], bias=bias, dtype=torch.float32)
    codes, grid = fmt.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    layer.load_state_dict({**fmt.pack(codes, grid), **({"bias": torch.randn(shape[0])} if bias else {})})
    return layer


def test_quant_linear() -> None:
    layer = quant_linear()
    x = torch.randn(2, 3, 72)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert layer.dequantize().shape == (24, 72)
    assert layer.explain(torch.float32)
    assert repr(layer) == "QuantLinear(in_features=72, out_features=24, bias=True, format=int4:g32)"
    assert list(layer.state_dict()) == ["bias", "weight_packed", "weight_scale", "weight_shape"]


def test_what_was_prepared_goes_when_the_weight_changes() -> None:
    layer, other = quant_linear(bias=False), quant_linear(bias=False)
    layer.keep_decoded = True  # a copy: nothing of it follows the buffers by itself
    other.get_buffer("weight_packed").bitwise_not_()
    x = torch.randn(3, 72)
    before: Tensor = layer(x)
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(layer(x), other(x))
        layer.load_state_dict(quant_linear(bias=False).state_dict(), assign=assign)
        assert torch.equal(layer(x), before)
    layer.keep_decoded = False
    torch.testing.assert_close(layer(x), before)
    assert list(layer._prepared) == [torch.float32]


@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_of_another_type_than_the_bias(autocast: bool) -> None:
    layer, x = quant_linear(), torch.randn(3, 72)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_inference_mode_leaves_nothing_that_training_cannot_use() -> None:
    layer = quant_linear()
    layer.keep_decoded = True
    with torch.inference_mode():
        layer(torch.randn(3, 72))
    x = torch.randn(3, 72, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.dequantize().sum(0))


# ---- refusals

LAYER = "model.layers.0.mlp.down_proj"


def assert_refused(folder: Path, message: str, error: type[LlmquantError] = VerificationError, **options: Any) -> None:
    with pytest.raises(error, match=message):
        load(folder, **options)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{LAYER}.{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_shape")),
        "model.layers.2.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("where", ["cpu", HALF_ON_DISK])
def test_a_missing_tensor_is_named(
    name: str, where: str | dict[str, str], damaged: Callable[..., Path], tmp_path: Path
) -> None:
    folder = damaged(lambda tensors, config: tensors.pop(name))
    assert_refused(folder, f"{name}: not found", device_map=where, offload_folder=tmp_path / "offload")


def test_missing_biases_are_counted(make: Callable[..., Folders]) -> None:
    folders = make("qwen2", everything("int4:g32"))
    tensors = load_file(folders.quantized / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".q_proj.bias")}
    save_file(kept, folders.quantized / "model.safetensors", {"format": "pt"})
    assert_refused(folders.quantized, "model.layers.0.self_attn.q_proj.bias and 2 more: not found")


def test_a_tied_head_needs_its_embeddings(make: Callable[..., Folders]) -> None:
    folders = make("llama", everything("int4:g32"), tied=True)
    tensors = load_file(folders.quantized / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folders.quantized / "model.safetensors", {"format": "pt"})
    assert_refused(folders.quantized, "model.embed_tokens.weight and 1 more: not found")


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "rows": ("weight_packed", lambda t: t[:-1].clone(), r"but should be torch.int32 \[64, "),
    "columns": ("weight_scale", lambda t: t.repeat(1, 2), "but should be"),
    "wider": ("weight_scale", lambda t: t.double(), "float64"),
    "narrower": ("weight_packed", lambda t: t.short(), "int16"),
    "shape type": ("weight_shape", lambda t: t.int(), "int32"),
    "shape": ("weight_shape", lambda t: t.flip(0), r"says \[128, 64\], but the layer is \[64, 128\]"),
    "nan": ("weight_scale", lambda t: t.index_fill(0, torch.tensor([1]), torch.nan), "not finite"),
    "inf": ("weight_scale", lambda t: t.index_fill(0, torch.tensor([1]), torch.inf), "not finite"),
}


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_is_named(change: str, dtype: Any, damaged: Callable[..., Path]) -> None:
    suffix, function, message = CHANGES[change]
    name = f"{LAYER}.{suffix}"
    folder = damaged(lambda tensors, config: tensors.update({name: function(tensors[name])}))
    assert_refused(folder, f"{name} .*{message}", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_another_type_are_not_cast_in_silence(dtype: torch.dtype, damaged: Callable[..., Path]) -> None:
    name = f"{LAYER}.weight_scale"

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        wrong = torch.float16 if tensors[name].dtype != torch.float16 else torch.float32
        tensors[name] = tensors[name].to(wrong)

    assert_refused(damaged(change), f"{name} is", dtype=dtype)


def test_what_may_be_missing(llama: Folders, damaged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may say that some tensors are not in its files, yet never those of a quantized layer."""
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"norm\.weight", "weight_scale"])
    name = f"{LAYER}.weight_scale"

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors["model.norm.weight"], tensors[name]

    assert_refused(damaged(change), f"{name}: not found")


def test_tensor_parallelism_is_refused(llama: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_tp_size", 2)
    assert_refused(llama.quantized, "tensor parallelism", PlanError)


def test_a_dense_tensor_of_another_shape(damaged: Callable[..., Path]) -> None:
    """Newer releases of transformers refuse it themselves, the older take it."""
    name = "model.norm.weight"
    folder = damaged(lambda tensors, config: tensors.update({name: tensors[name][:1].clone()}))
    with pytest.raises((VerificationError, RuntimeError), match=r"norm.weight|mismatch"):
        load(folder)


def test_truncated_and_overwritten_files(llama: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.quantized, tmp_path / "m"))
    content = (folder / "model.safetensors").read_bytes()
    for damage in (content[:-5], content[:100], b"", b"\xff" * 64 + content[64:]):
        (folder / "model.safetensors").write_bytes(damage)
        assert_refused(folder, r"model.safetensors: truncated or not safetensors", CheckpointError)


def test_pickles_are_not_read(llama: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.quantized, tmp_path / "m"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "not safetensors", CheckpointError)
    with pytest.raises((OSError, LlmquantError), match="safetensors"):
        llmquant.load(folder)


CONFIGS: dict[str, tuple[Any, str, type[LlmquantError]]] = {
    "absent module": (
        {"int4:g32": ["model.layers.7.mlp.up_proj"]},
        "layers.7.mlp.up_proj is quantized",
        CheckpointError,
    ),
    "norm": (
        {"int4:g32": ["model.norm"]},
        "model.norm cannot be .* LlamaRMSNorm",
        CheckpointError,
    ),
    "block": ({"int4:g32": ["model.layers.0"]}, "layers.0 cannot be .* LlamaDecoderLayer", CheckpointError),
    "twice": ({"int4:g32": [LAYER], "int8:channel": [LAYER]}, "down_proj is listed twice", CheckpointError),
    "unknown format": ({"int9:g32": [LAYER]}, "'int9:g32' is unknown", PlanError),
    "large group": ({"int4:g256": [LAYER]}, "down_proj cannot be int4:g256: group 256", CheckpointError),
    "no list": ({"int4:g32": LAYER}, "must give int4:g32 a list", CheckpointError),
    "no formats": (None, 'has no "formats"', CheckpointError),
    "another format": ({"int5:g32": [LAYER]}, "down_proj.weight_packed is", VerificationError),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(case: str, damaged: Callable[..., Path]) -> None:
    listed, message, error = CONFIGS[case]
    folder = damaged(lambda tensors, config: config["quantization_config"].update(formats=listed))
    assert_refused(folder, message, error)


def test_a_tied_head_cannot_be_quantized(make: Callable[..., Folders]) -> None:
    folders = make("llama", everything("int4:g32"), tied=True)
    config = json.loads((folders.quantized / "config.json").read_text())
    config["quantization_config"]["formats"]["int4:g32"].append("lm_head")
    (folders.quantized / "config.json").write_text(json.dumps(config))
    assert_refused(folders.quantized, "lm_head is listed .*tie_word", CheckpointError)


# ---- the front door


def test_load(llama: Folders, tmp_path: Path) -> None:
    model = llmquant.load(llama.quantized, dtype=torch.float32)
    assert not model.training
    assert torch.equal(logits(model), logits(load(llama.quantized, dtype=torch.float32)))
    assert set(llmquant.explain(model)) == set(llama.names)
    with pytest.raises(CheckpointError, match="it is not quantized"):
        llmquant.load(llama.dense)
    with pytest.raises(CheckpointError, match="no model here"):
        llmquant.load(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match="loaded after `llmquant convert`"):
        llmquant.load(tmp_path)


def test_the_config_keeps_what_it_does_not_know() -> None:
    content = {
        "quant_method": "llmquant",
        "version": "7",
        "formats": {"int4:g32": ["a"]},
        "to_dict": 1,
        "dequantize": True,
    }
    config = LlmquantConfig.from_dict(content)
    assert config.to_dict() == content
    assert config.modules() == {"a": formats.get("int4:g32")}


def test_a_dense_model_is_not_quantized_on_loading(llama: Folders) -> None:
    with pytest.raises(ValueError, match="pre-quantized"):
        load(llama.dense, quantization_config=LlmquantConfig(formats={}))


def test_public_names() -> None:
    register()  # once more does no harm
    assert sorted(llmquant.__all__) == llmquant.__all__ == dir(llmquant)
    assert all(getattr(llmquant, name) for name in llmquant.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        llmquant.nothing  # noqa: B018
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project.get("version", llmquant.__version__) == llmquant.__version__


@pytest.mark.parametrize(
    "imports",
    [
        "import llmquant; assert not {'torch', 'transformers'} & set(sys.modules); import transformers",
        "import transformers; transformers.AutoModelForCausalLM; import llmquant",
    ],
)
def test_imports_in_either_order(imports: str, llama: Folders) -> None:
    script = f"""import sys; {imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)"""
    run = [sys.executable, "-c", script, str(llama.quantized)]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == "QuantLinear"
