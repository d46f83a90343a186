"""Checkpoints of other tools, made here by compressed-tensors' own compressors and by GPTQ's packing loops."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import api, cli, inspection
from llmquant.errors import CheckpointError, LlmquantError, PlanError, VerificationError

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
TOKENS = torch.arange(40).view(1, -1) * 7


@pytest.fixture(scope="module")
def small(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the bundled model."""
    tensors = load_file(pycode / "model.safetensors")
    few = {n: t for n, t in tensors.items() if not n.startswith(tuple(f"model.layers.{k}." for k in range(2, 6)))}
    folder = write(tmp_path_factory.mktemp("small") / "model", pycode, few, None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return folder


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(folder: Path, source: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@torch.no_grad()
def assert_same_model(found: Any, dense: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


# ---- GPTQ


def gptq_layer(w: Tensor, bits: int, group: int, *, sym: bool, first: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer (out, in), packed word by word in loops, and the weight that they stand for."""
    outputs, inputs = w.shape
    x = w.float().view(outputs, -1, group)
    low, high = (x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0))
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale.float()).round().clamp(1, 2**bits - 1)
    codes = ((x / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    decoded = ((codes - zero[..., None]) * scale.float()[..., None]).view(outputs, inputs)
    tensors = {
        "qweight": words(codes.view(outputs, inputs).T.int(), bits),
        "qzeros": words((zero.T.int() - (1 if first else 0)).T, bits).T,
        "scales": scale.T,
        "g_idx": (torch.arange(inputs) // group).int(),
    }
    return tensors, decoded


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, m) -> (n * bits / 32, m) int32, one after the other down the columns."""
    found = [[0] * codes.shape[1] for _ in range(math.ceil(len(codes) * bits / 32))]
    for column, values in enumerate(codes.T.tolist()):
        stream = sum(value << (bits * place) for place, value in enumerate(values))
        for place in range(len(found)):
            word = (stream >> (32 * place)) & 0xFFFFFFFF
            found[place][column] = word - 2**32 if word >= 2**31 else word
    return torch.tensor(found, dtype=torch.int32)


@pytest.fixture
def gptq(small: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """gptq(change, bits=, group=, sym=, first=) -> a GPTQ folder, changed, and the dense one that it stands for."""

    def make(
        change: Change = lambda tensors, config: None,
        *,
        bits: int = 4,
        group: int = 64,
        sym: bool = True,
        first: bool = True,
    ) -> tuple[Path, Path]:
        stored, dense = dict[str, Tensor](), dict[str, Tensor]()
        for name, w in load_file(small / "model.safetensors").items():
            dense[name] = w.float()
            if not is_linear(name):
                stored[name] = w
                continue
            tensors, dense[name] = gptq_layer(w, bits, min(group, w.shape[1]), sym=sym, first=first)
            stored |= {f"{name.removesuffix('weight')}{suffix}": t for suffix, t in tensors.items()}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
        if not first:
            config["checkpoint_format"] = "gptq_v2"
        change(stored, config)
        return write(tmp_path / "gptq", small, stored, config), write(tmp_path / "dense", small, dense, None)

    return make


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, "int4:g64:fp16"),
        ({"sym": False}, "int4:g64:asym:fp16"),
        ({"bits": 8, "first": False}, "int8:g64:fp16"),
        ({"bits": 3, "group": 128, "sym": False, "first": False}, "int3:g128:asym:fp16"),
    ],
    ids=str,
)
def test_gptq_keeps_every_value(options: dict[str, Any], spec: str, gptq: Any, tmp_path: Path) -> None:
    source, dense = gptq(**options)
    facts = llmquant.convert(source, tmp_path / "out")
    # A group as long as the row is a channel.
    assert {tensor["format"].replace("channel", "g128") for tensor in facts["tensors"]} <= {
        spec,
        spec.replace("channel", "g128"),
    }
    assert inspection.verify(tmp_path / "out") == []
    model = llmquant.load(tmp_path / "out", dtype=torch.float32)
    expected = load_file(dense / "model.safetensors")
    for tensor in facts["tensors"]:
        layer: Any = model.get_submodule(tensor["name"])
        assert torch.equal(layer.dequantize(), expected[tensor["key"]]), tensor["name"]
    assert_same_model(model, dense)


def shuffled_columns(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"].flip(0)


def missing_scales(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    del tensors["model.layers.0.mlp.up_proj.scales"]


def zero_beyond(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.qzeros"].fill_(-1)  # 15 in each, which stands for 16


def wrong_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.qweight"] = tensors["model.layers.1.mlp.up_proj.qweight"][:5]


def other_method(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["quant_method"] = "awq"


def bias_there(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.ones(384)


DAMAGES: list[tuple[Change, type[LlmquantError], str]] = [
    (shuffled_columns, PlanError, r"layers\.0\.mlp\.up_proj: its columns are in an order of their own \(desc_act\)"),
    (missing_scales, CheckpointError, r"layers\.0\.mlp\.up_proj\.scales: is missing"),
    (zero_beyond, PlanError, r"layers\.1\.mlp\.up_proj: a zero point of 16 is no code of 4 bits"),
    (wrong_shape, PlanError, r"layers\.1\.mlp\.up_proj\.qweight: \(5, 384\) with 2 groups is no matrix of 384x128"),
    (other_method, PlanError, "its quant_method is awq: what is read are compressed-tensors and gptq"),
    (bias_there, VerificationError, r"layers\.1\.mlp\.up_proj\.bias: the model has no bias there"),
]


@pytest.mark.parametrize(("change", "error", "message"), DAMAGES)
def test_what_cannot_be_converted_is_named(
    change: Change, error: type[LlmquantError], message: str, gptq: Any, tmp_path: Path
) -> None:
    source, _ = gptq(change)
    with pytest.raises(error, match=message):
        llmquant.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_of_zeros_are_left_out(gptq: Any, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(384)

    source, dense = gptq(add)
    llmquant.convert(source, tmp_path / "out")
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.endswith("up_proj.bias")]
    assert_same_model(llmquant.load(tmp_path / "out", dtype=torch.float32), dense)


def test_loading_gptq_names_the_command(gptq: Any) -> None:
    with pytest.raises(CheckpointError, match="after `llmquant convert`"):
        llmquant.load(gptq()[0])


# ---- compressed-tensors


@pytest.fixture
def compressed(small: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """compressed(arguments, compressor) -> a folder that compressed-tensors' compressor made, and the dense one."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.base")

    def make(arguments: dict[str, Any], compressor: str, targets: list[str]) -> tuple[Path, Path]:
        weights = quantization.QuantizationArgs(dynamic=False, **arguments)
        scheme = quantization.QuantizationScheme(targets=targets, weights=weights)
        theirs = base.BaseCompressor.get_value_from_registry(compressor)
        stored, dense = dict[str, Tensor](), dict[str, Tensor]()
        for name, w in load_file(small / "model.safetensors").items():
            dense[name] = w
            if not is_linear(name):
                stored[name] = w
                continue
            x = w.float().view(w.shape[0], -1, arguments.get("group_size", w.shape[1]))
            low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
            named: dict[str, Tensor] = {"weight": w}
            if arguments.get("symmetric", True):
                largest = 448.0 if arguments["type"] == "float" else 2 ** (arguments["num_bits"] - 1) - 0.5
                named["weight_scale"] = (torch.maximum(high, -low) / largest).bfloat16()
            else:
                top = 2 ** arguments["num_bits"] - 1
                named["weight_scale"] = ((high - low) / top).bfloat16()
                middle = 2 ** (arguments["num_bits"] - 1)
                zero = (-low / named["weight_scale"].float()).round().clamp(0, top) - middle
                named["weight_zero_point"] = zero.to(torch.int8)
            packed = theirs.compress(named, scheme)
            stored |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in packed.items()}
            dense[name] = theirs.decompress(dict(packed), scheme)["weight"]
        group = {"targets": targets, "weights": json.loads(weights.model_dump_json()), "input_activations": None}
        config = {"quant_method": "compressed-tensors", "format": compressor, "config_groups": {"group_0": group}}
        config |= {"ignore": ["lm_head"], "quantization_status": "compressed"}
        return write(tmp_path / "ct", small, stored, config), write(tmp_path / "dense", small, dense, None)

    return make


CASES = [
    ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}, "pack-quantized", "int4:g64:bf16"),
    ({"num_bits": 8, "type": "int", "strategy": "channel"}, "pack-quantized", "int8:channel:bf16"),
    (
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
        "pack-quantized",
        "int4:g128:asym:bf16",
    ),
    ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized", "fp8_e4m3:channel:bf16"),
]


@pytest.mark.parametrize(("arguments", "compressor", "spec"), CASES, ids=[spec for _, _, spec in CASES])
def test_compressed_tensors_is_served_and_converted(
    arguments: dict[str, Any], compressor: str, spec: str, compressed: Any, tmp_path: Path
) -> None:
    targets = ["re:.*self_attn.*", "re:.*mlp.*"] if spec.startswith("int4:g64") else ["Linear"]
    source, dense = compressed(arguments, compressor, targets)
    served = llmquant.load(source, dtype=torch.bfloat16)
    facts = llmquant.convert(source, tmp_path / "out")
    assert {tensor["format"] for tensor in facts["tensors"]} == {spec}
    assert (tmp_path / "out" / "model.safetensors").samefile(source / "model.safetensors")
    expected = load_file(dense / "model.safetensors")
    for model in (served, llmquant.load(tmp_path / "out")):
        for tensor in facts["tensors"]:
            layer: Any = model.get_submodule(tensor["name"])
            assert torch.equal(layer.dequantize(torch.bfloat16), expected[tensor["key"]]), tensor["name"]
    assert torch.isfinite(served(TOKENS).logits).all()


def test_columns_in_another_order_are_refused(compressed: Any, tmp_path: Path) -> None:
    source, _ = compressed(CASES[0][0], "pack-quantized", ["Linear"])
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.up_proj\.weight_g_idx: has no place in int4:g64:bf16"):
        llmquant.convert(source, tmp_path / "out")


def test_command(gptq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source, _ = gptq()
    monkeypatch.setattr(sys, "argv", ["llmquant", "convert", str(source), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "14 matrices in int4:g64:fp16" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["llmquant", "inspect", str(tmp_path / "out"), "--verify"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_a_folder_that_transformers_needs_another_package_for_is_one_line(
    pycode: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loader:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise ImportError("Loading a GPTQ quantized model requires optimum")

    monkeypatch.setattr(api, "loader_of", lambda config: Loader)
    with pytest.raises(PlanError, match=r"pycode cannot be loaded: .* requires optimum"):
        api.load_any(str(pycode), torch.float32)
