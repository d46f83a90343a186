"""Exports: read by the other side without llmquant, refused by name where they cannot be, nothing half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmquant
from llmquant import cli, formats, inspection
from llmquant.errors import OutputError, PlanError, VerificationError
from llmquant.exchange import compressed_tensors, export, gptq
from llmquant.formats.integer import Integer
from llmquant.linear import QuantLinear
from llmquant.recipe import Recipe, Rule

Make = Callable[[str | Recipe], Path]
MIXED = Recipe((Rule("*.down_proj", "int8:channel"), Rule("*.o_proj", None), Rule("*", "int3:g64")))
TOKENS = torch.arange(40).view(1, -1) * 7


@pytest.fixture(scope="module")
def quantized(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """quantized(format or recipe) -> a folder with a random model so, a tokenizer beside it; each is made once."""
    made: dict[str, Path] = {}
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    model = make_checkpoint(tmp_path_factory.mktemp("source") / "model", "llama", dtype=torch.bfloat16, **sizes)
    shutil.copy(pycode / "tokenizer.json", model)

    def make(kind: str | Recipe) -> Path:
        key = str(kind)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / "q"
            llmquant.quantize(model, made[key], format=kind, quality="fast")
        return made[key]

    return make


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---- dense


@torch.no_grad()
def test_dense_holds_what_the_quantized_layers_stand_for(quantized: Make, tmp_path: Path) -> None:
    assert llmquant.export(quantized(MIXED), tmp_path / "dense", "dense") == []
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    layers = {n: m for n, m in llmquant.load(quantized(MIXED)).named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 36
    for name, layer in layers.items():
        assert torch.equal(dense.get_submodule(name).weight, layer.dequantize(torch.bfloat16)), name
    assert (tmp_path / "dense" / "tokenizer.json").is_file()


# ---- compressed-tensors

READ = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(40).view(1, -1) * 7
for name in sys.argv[1:]:
    found, dense = (AutoModelForCausalLM.from_pretrained(f"{name}-{kind}")(tokens).logits for kind in ("ct", "dense"))
    assert torch.equal(found, dense), (name, (found - dense).abs().max())
assert "llmquant" not in sys.modules
"""


def test_transformers_alone_reads_compressed_tensors(quantized: Make, tmp_path: Path) -> None:
    """In a process that never imports llmquant: the logits are those of the decoded weights, to the bit."""
    pytest.importorskip("compressed_tensors")
    kinds: list[str | Recipe] = ["int4:g64", MIXED, "int2:g32", "mxfp4", "nvfp4", "fp8_e4m3:block:bf16"]
    for number, kind in enumerate(kinds):
        llmquant.export(quantized(kind), tmp_path / f"{number}-ct", "compressed-tensors")
        llmquant.export(quantized(kind), tmp_path / f"{number}-dense", "dense")
    names = [str(tmp_path / str(number)) for number in range(len(kinds))]
    ended = subprocess.run([sys.executable, "-c", READ, *names], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_shards_are_linked_and_the_result_verifies(quantized: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source, out = quantized("int4:g64"), tmp_path / "out"
    llmquant.export(source, out, "compressed-tensors")
    shards = sorted(source.glob("*.safetensors"))
    assert shards
    assert all((out / shard.name).samefile(shard) for shard in shards)
    assert inspection.verify(out) == []
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert settings["ignore"] == ["lm_head"]


def test_several_formats_are_named_module_by_module(quantized: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    llmquant.export(quantized(MIXED), out, "compressed-tensors")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["targets"] for group in settings["config_groups"].values()}
    assert groups[8] == [f"model.layers.{n}.mlp.down_proj" for n in range(6)]
    assert len(groups[3]) == 30
    assert settings["ignore"] == ["lm_head", *(f"model.layers.{n}.self_attn.o_proj" for n in range(6))]


def test_layers_that_vllm_fuses_and_that_differ_are_noted(quantized: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    rules = Recipe((Rule("*.layers.2.*.k_proj", "int8:g64"), Rule("*", "int4:g64")))
    notes = llmquant.export(quantized(rules), tmp_path / "out", "compressed-tensors")
    assert len(notes) == 1
    assert notes[0].startswith("model.layers.2.self_attn: q_proj, k_proj, v_proj differ in format")


@pytest.mark.parametrize(("kind", "note"), [("int4:g64:asym", "zero points"), ("fp8_e4m3:channel", "casts its scales")])
def test_what_only_some_readers_take_is_noted(kind: str, note: str, quantized: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    (said,) = llmquant.export(quantized(kind), tmp_path / "out", "compressed-tensors")
    assert note in said


def test_another_reading_is_refused(quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    real = compressed_tensors.decoded
    monkeypatch.setattr(compressed_tensors, "decoded", lambda fmt, named: real(fmt, named) * 1.02)
    with pytest.raises(VerificationError, match="compressed-tensors decodes other values"):
        llmquant.export(quantized("int4:g64"), tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_remedy(
    quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(PlanError, match=r"pip install 'llmquant\[compressed-tensors\]'"):
        llmquant.export(quantized("int4:g64"), tmp_path / "out", "compressed-tensors")


# ---- GPTQ


def by_hand(words: Tensor, bits: int, count: int) -> list[int]:
    """Codes of a stream of int32 words, least significant bit first, in Python's own integers."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words.tolist()))
    return [(stream >> (bits * place)) & (2**bits - 1) for place in range(count)]


@pytest.mark.parametrize("spec", ["int4:g32", "int3:g64", "int2:g32:asym", "int8:channel", "int4:channel:sym_gptq"])
def test_gptq_layout_by_hand(spec: str) -> None:
    """Codes down the columns of qweight, zero points along the rows of qzeros, float16 scales of (groups, out)."""
    fmt = formats.get(spec + ":fp16")
    assert isinstance(fmt, Integer)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    codes, grid = fmt.quantize(w)
    named, decoded = gptq.pack(fmt, codes, grid, "w"), fmt.decode(codes, grid)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in named.items()} == {
        "qweight": (torch.int32, (128 * fmt.bits // 32, 64)),
        "qzeros": (torch.int32, (128 // grid.group, 64 * fmt.bits // 32)),
        "scales": (torch.float16, (128 // grid.group, 64)),
        "g_idx": (torch.int32, (128,)),
    }
    for column in (0, 5, 63):  # of qweight: an output
        levels = by_hand(named["qweight"][:, column], fmt.bits, 128)
        for place, level in enumerate(levels):
            group = int(named["g_idx"][place])
            zero = by_hand(named["qzeros"][group], fmt.bits, 64)[column]
            assert (level - zero) * float(named["scales"][group, column]) == float(decoded[column, place])


def test_gptq_folder(quantized: Make, tmp_path: Path) -> None:
    source, out = quantized(MIXED), tmp_path / "out"
    llmquant.export(source, out, "gptq")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (3, 64, True, False)
    eights = {f"+:^model\\.layers\\.{n}\\.mlp\\.down_proj$" for n in range(6)}
    assert {name for name, rule in settings["dynamic"].items() if rule.get("bits") == 8} == eights
    assert {name for name, rule in settings["dynamic"].items() if not rule} == {
        f"-:^model\\.layers\\.{n}\\.self_attn\\.o_proj$" for n in range(6)
    }
    tensors, model = all_tensors(out), llmquant.load(source)
    for name in ("model.layers.1.mlp.down_proj", "model.layers.5.self_attn.q_proj"):
        named = {suffix: tensors[f"{name}.{suffix}"] for suffix in gptq.SUFFIXES}
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        fmt = layer.format
        assert isinstance(fmt, Integer)
        codes = torch.tensor([by_hand(column, fmt.bits, layer.in_features) for column in named["qweight"].T])
        scales = named["scales"].T.float()[:, named["g_idx"].long()]
        assert torch.equal((codes - 2 ** (fmt.bits - 1)) * scales, layer.dequantize())


def test_a_scale_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    fmt = formats.get("int4:g32:bf16")
    assert isinstance(fmt, Integer)
    codes, grid = fmt.quantize(torch.randn(32, 64) * 1e6)
    with pytest.raises(PlanError, match=r"layer\.3: .* of row 0, group 0, is no float16"):
        gptq.pack(fmt, codes, grid, "layer.3")


# ---- refusals

REFUSALS = [
    ("compressed-tensors", "nf4:g64", "self_attn.q_proj: compressed-tensors cannot hold it: it has no nf4:g64"),
    ("compressed-tensors", "int4:tensor", "self_attn.q_proj: compressed-tensors cannot hold it: its integers have"),
    ("compressed-tensors", "int4:g96", "self_attn.q_proj: compressed-tensors cannot hold it: its 128 inputs"),
    ("compressed-tensors", "int4:g64:fp32", "self_attn.q_proj: compressed-tensors cannot hold it: its scales are"),
    (
        "gptq",
        "int5:g64",
        "self_attn.q_proj: GPTQ's files cannot hold it: int5:g64:bf16 is no integer of 2",
    ),
    ("gptq", "mxfp4", "self_attn.q_proj: GPTQ's files cannot hold it: mxfp4 is no integer"),
    ("gptq", "int4:g64:asym_float", "self_attn.q_proj: GPTQ's files cannot hold it: its zero points are real"),
    ("gptq", "int4:tensor", "self_attn.q_proj: GPTQ's files cannot hold it: it has one scale for all"),
    ("gptq", "int4:g64:fp32", "self_attn.q_proj: GPTQ's files cannot hold it: its scales are float32"),
    ("gptq", "int4:g96", "self_attn.q_proj: GPTQ's files cannot hold it: its 128 inputs are no multiple"),
    ("onnx", "int4:g64", "export target 'onnx' is unknown"),
]


@pytest.mark.parametrize(("to", "spec", "message"), REFUSALS, ids=lambda value: str(value)[:30])
def test_refused_in_the_plan_by_name(
    to: str, spec: str, message: str, pycode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before a run that would end in an export that cannot be: nothing is written."""
    command = ["quantize", pycode, "--format", spec, "--quality", "fast", "--to", to, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert (ended.value.code, message in said) == (4, True), said
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_dense_experts(name: str, tmp_path: Path) -> None:
    """Those of gpt-oss lie as (in, out). transformers loads the one tensor that they are in memory."""
    model = make_checkpoint(tmp_path / "moe", name, max_shard_size="60KB")
    facts = llmquant.quantize(model, tmp_path / "experts", format="int4:g16", quality="fast")
    assert any("expert" in tensor for tensor in facts["tensors"])
    assert llmquant.export(tmp_path / "experts", tmp_path / "dense", "dense") == []
    ours = llmquant.load(tmp_path / "experts")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="eager")
    tokens = TOKENS % ours.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens).logits, ours(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", export.TARGETS)
def test_experts_and_embeddings_are_refused_by_name(to: str, tmp_path: Path) -> None:
    """Experts held as one tensor by every target, embeddings by all that hold no table: before a run and after it."""
    model = make_checkpoint(tmp_path / "moe", "qwen3_moe")
    llmquant.quantize(
        model, tmp_path / "experts", format=Recipe.uniform("int4:g16", skip=("*_attn.*",)), quality="fast"
    )
    if to != "dense":
        with pytest.raises(PlanError, match=r"mlp\.experts\.\w+\.0: is one of many experts"):
            llmquant.export(tmp_path / "experts", tmp_path / "out", to)
    model = make_checkpoint(tmp_path / "model", "llama", tied=False)
    recipe = Recipe((Rule("model.embed_tokens", "int8:channel"), Rule("*", None)))
    llmquant.quantize(model, tmp_path / "table", format=recipe, quality="fast")
    if to == "dense":
        assert llmquant.export(tmp_path / "table", tmp_path / "out", to) == []
        ours, dense = llmquant.load(tmp_path / "table"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(ours.model.embed_tokens(TOKENS), dense.model.embed_tokens(TOKENS))
    else:
        with pytest.raises(PlanError, match=r"model\.embed_tokens: is an embedding"):
            llmquant.export(tmp_path / "table", tmp_path / "out", to)


def test_only_finished_folders_are_exported(pycode: Path, quantized: Make, tmp_path: Path) -> None:
    with pytest.raises(llmquant.LlmquantError, match="not a finished result"):
        llmquant.export(pycode, tmp_path / "out", "dense")
    llmquant.export(quantized("int4:g64"), tmp_path / "dense", "dense")
    with pytest.raises(llmquant.LlmquantError, match="no model in llmquant's own format"):
        llmquant.export(tmp_path / "dense", tmp_path / "out", "dense")
    with pytest.raises(OutputError, match="holds a finished result"):
        llmquant.export(quantized("int4:g64"), tmp_path / "dense", "dense")


def test_a_cut_export_is_taken_up(quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, whole, out = quantized("int4:g64"), tmp_path / "whole", tmp_path / "out"
    llmquant.export(source, whole, "gptq")
    real, seen = gptq._verify, []

    def counted(limit: int) -> Callable[..., None]:
        def verify(*arguments: Any) -> None:
            seen.append(arguments)
            if len(seen) == limit:
                raise KeyboardInterrupt
            real(*arguments)

        return verify

    monkeypatch.setattr(gptq, "_verify", counted(20))  # a block has seven
    with pytest.raises(KeyboardInterrupt):
        llmquant.export(source, out, "gptq")
    assert not out.exists()
    seen.clear()
    monkeypatch.setattr(gptq, "_verify", counted(0))
    llmquant.export(source, out, "gptq")
    assert len(seen) == 42 - 14
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_export_at_quantize_time(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "out"
    command = ["quantize", tiny, "--group", "64", "--quality", "fast", "--to", "gptq", "--output", out, "--json"]
    monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["export"]["output"] == f"{out}-gptq"
    config = json.loads((tmp_path / "out-gptq" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64


def test_command(quantized: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = tmp_path / "model"
    shutil.copytree(quantized("int4:g64"), source)
    for extra in (["--dry-run"], []):
        monkeypatch.setattr(sys, "argv", ["llmquant", "export", str(source), "--to", "dense", *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert (tmp_path / "model-dense").exists() == (extra == [])
    assert f"exported and verified: {tmp_path / 'model-dense'}" in capsys.readouterr().out.replace("\n", "")
    assert set(export.TARGETS) >= {"compressed-tensors", "gptq", "dense"}
