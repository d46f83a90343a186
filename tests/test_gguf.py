"""GGUF files: block by block by hand, and read whole by transformers, which decodes them on its own."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from architectures import make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmquant
from llmquant import formats, inspection
from llmquant.errors import PlanError, VerificationError
from llmquant.exchange import gguf
from llmquant.exchange.model import Model

package = pytest.importorskip("gguf")
TOKENS = torch.arange(40).view(1, -1) * 7
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def by_hand(kind: str, block: bytes) -> list[float]:
    """The 32 values of a block, as ggml-common.h describes it."""
    half = lambda at: struct.unpack_from("<e", block, at)[0]  # noqa: E731
    low_then_high = lambda packed: [b & 15 for b in packed] + [b >> 4 for b in packed]  # noqa: E731
    if kind == "Q8_0":
        return [code * half(0) for code in struct.unpack_from("<32b", block, 2)]
    if kind == "MXFP4":
        codes = low_then_high(block[1:])
        return [(-1 if code & 8 else 1) * E2M1[code & 7] * 2.0 ** (block[0] - 127) for code in codes]
    offset = kind.endswith("_1")
    codes = low_then_high(block[-16:])
    if kind.startswith("Q5"):
        fifth = int.from_bytes(block[-20:-16], "little")
        codes = [code | ((fifth >> place & 1) << 4) for place, code in enumerate(codes)]
    return [code * half(0) + half(2) if offset else (code - (16 if kind[1] == "5" else 8)) * half(0) for code in codes]


@pytest.mark.parametrize(
    ("spec", "kind", "size"),
    [
        ("int4:g32:fp16", "Q4_0", 18),
        ("int4:g32:sym_gptq:fp16", "Q4_0", 18),
        ("int4:g32:asym_float:fp16", "Q4_1", 20),
        ("int5:g32:sym:fp16", "Q5_0", 22),
        ("int5:g32:asym_float:fp16", "Q5_1", 24),
        ("int8:g32:fp16", "Q8_0", 34),
        ("mxfp4", "MXFP4", 17),
    ],
)
def test_blocks_by_hand(spec: str, kind: str, size: int) -> None:
    fmt = formats.get(spec)
    codes, grid = fmt.quantize(torch.randn(3, 96, generator=torch.Generator().manual_seed(1)))
    packed = gguf.blocks(fmt, codes, grid, "w")
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (3, 3 * size))
    rows = [bytes(row.tolist()) for row in packed]
    found = [[by_hand(kind, row[at : at + size]) for at in range(0, len(row), size)] for row in rows]
    assert torch.equal(torch.tensor(found).view(3, 96), fmt.decode(codes, grid))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def fours(pycode: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fours") / "q"
    llmquant.quantize(pycode, folder, format="int4:g32:fp16", quality="fast")
    return folder


@pytest.mark.parametrize("spec", ["int4:g32:fp16", "int8:g32"])
def test_transformers_reads_the_file(spec: str, fours: Path, pycode: Path, tmp_path: Path) -> None:
    """Its tokenizer too. It has the rows of q and k in Llama's order, so that an error in that shows."""
    folder = fours if spec == "int4:g32:fp16" else tmp_path / "q"
    if folder != fours:
        llmquant.quantize(pycode, folder, format=spec, quality="fast")
    llmquant.export(folder, tmp_path / "out", "gguf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "llmquant.json"}
    assert inspection.verify(tmp_path / "out") == []
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    expected = logits(llmquant.load(folder, dtype=torch.float32))
    torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-3)
    text = 'def read(self, path):\n    """Été 1234."""\n'
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert theirs(text).input_ids == AutoTokenizer.from_pretrained(pycode)(text).input_ids


def test_biases_and_rows_in_their_own_order(pycode: Path, tmp_path: Path) -> None:
    """Qwen2 has biases at q, k and v, and its rows stay where they are; a head of its own."""
    source = make_checkpoint(tmp_path / "source", "qwen2", tied=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pycode / name, source)
    shrink_tokenizer(source, json.loads((source / "config.json").read_text())["vocab_size"])
    llmquant.quantize(source, tmp_path / "q", format="int8:g32:fp16", quality="fast")
    llmquant.export(tmp_path / "q", tmp_path / "out", "gguf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    tokens = TOKENS % found.config.vocab_size
    with torch.no_grad():
        theirs = found(tokens).logits
        ours = llmquant.load(tmp_path / "q", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)


def shrink_tokenizer(folder: Path, size: int) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = {text: number for text, number in content["model"]["vocab"].items() if number < size}
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    path.write_text(json.dumps(content))


def test_llama3_frequencies(pycode: Path, tmp_path: Path) -> None:
    """The factors divide the plain frequencies into those that transformers computes."""
    config = json.loads((pycode / "config.json").read_text())
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    shutil.copytree(pycode, tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    llmquant.quantize(tmp_path / "source", tmp_path / "q", format="int4:g32:fp16", quality="fast")
    llmquant.export(tmp_path / "q", tmp_path / "out", "gguf")
    stored = {tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    factors = torch.tensor(stored["rope_freqs.weight"].data)
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    plain = 10000.0 ** (-torch.arange(16) / 16)
    skeleton = Model.open(tmp_path / "q").skeleton
    torch.testing.assert_close(plain / factors, skeleton.get_buffer("model.rotary_emb.inv_freq"), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4:g64:fp16", "q_proj: GGUF cannot hold it: int4:g64:fp16 is none of its types: use int4:g32"),
        ("int4:g32:asym:fp16", "q_proj: GGUF cannot hold it: int4:g32:asym:fp16 is none of its types"),
        ("int4:g32:fp32", "q_proj: GGUF cannot hold it: its scales are float32"),
        ("nvfp4", "q_proj: GGUF cannot hold it: nvfp4 is none"),
    ],
)
def test_refused_by_name(spec: str, message: str, tiny: Path, tmp_path: Path) -> None:
    llmquant.quantize(tiny, tmp_path / "q", format=spec, quality="fast")
    with pytest.raises(PlanError, match=message):
        llmquant.export(tmp_path / "q", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_otherwise_never_gets_its_name(
    fours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_nibbles", lambda codes: codes.view(len(codes), -1, 2, 16)[:, :, 0])
    with pytest.raises(VerificationError, match=r"blk\.0\.attn_q\.weight: the gguf package reads other values"):
        llmquant.export(fours, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
