"""GGUF: one file for llama.cpp and what is built on it.

Integers of 4, 5 and 8 bits and MXFP4 in groups of 32 are its types Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4, code by
code; what is dense becomes F16, vectors F32. Blocks of 32 weights follow each other in a row, scales before codes:

    Q4_0  float16 d, 16 bytes             w = (code - 8) d     byte j holds element j low and element j + 16 high
    Q4_1  float16 d, float16 m, 16 bytes  w = code d + m
    Q5_0  float16 d, 4 bytes, 16 bytes    w = (code - 16) d    the 4 bytes hold the fifth bits
    Q5_1  float16 d, float16 m, 4, 16     w = code d + m
    Q8_0  float16 d, 32 bytes             w = code d           signed
    MXFP4 byte e, 16 bytes                w = level 2**(e - 127)

Source: ggml, src/ggml-common.h and ggml-quants.c; the names of tensors and fields are those of the gguf package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from llmquant.errors import PlanError, VerificationError
from llmquant.exchange.extras import extra
from llmquant.exchange.model import Matrix, Model, Progress, as_float16
from llmquant.formats import Format
from llmquant.formats.base import Grid
from llmquant.formats.integer import Integer
from llmquant.formats.mx import MX, encode_exponent
from llmquant.output import OutputFolder

FILE = "model.gguf"
BLOCK = 32
# model_type -> its architecture in GGUF, and whether rows of q and k lie in the order of the original Llama.
ARCHITECTURES = {"llama": ("LLAMA", True), "mistral": ("LLAMA", True), "qwen2": ("QWEN2", False)}
ARCHITECTURES |= {"qwen3": ("QWEN3", False)}
ROPES = ("default", "linear", "llama3")
# How a byte-level tokenizer splits text before it merges -> llama.cpp's name of that.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"": "gpt-2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def check(model: Model) -> list[str]:
    gguf = extra("gguf")
    kind = model.config["model_type"]
    if kind not in ARCHITECTURES:
        raise PlanError(f"model_type {kind!r} is none that is written to GGUF here: {', '.join(ARCHITECTURES)}")
    rope = (model.config.get("rope_parameters") or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise PlanError(f"config.json: rope_type {rope!r} is none that is written to GGUF here: {', '.join(ROPES)}")
    for matrix in model.matrices:
        if reason := _refusal(matrix):
            raise PlanError(f"{matrix.target.name}: GGUF cannot hold it: {reason}")
    names = _names(model, gguf)
    stored = {name for matrix in model.matrices for name in matrix.names}
    for key in [m.key for m in model.matrices] + [name for name in model.checkpoint.names() if name not in stored]:
        if names(key) is None:
            raise PlanError(f"{key}: GGUF has no place for it in a {kind}")
    _tokenizer(model.checkpoint.folder)
    return ["what is not quantized is rounded to float16"]


def _refusal(matrix: Matrix) -> str | None:
    fmt, columns = matrix.format, matrix.target.shape[1]
    if _type(fmt) is None:
        return (
            f"{fmt.spec} is none of its types: use int4:g32:fp16, int5:g32:fp16 or int8:g32:fp16, with :asym_float, or "
            "mxfp4"
        )
    if columns % BLOCK:
        return f"its {columns} inputs are no multiple of {BLOCK}: keep it dense with --skip"
    if isinstance(fmt, Integer) and fmt.scale_dtype == torch.float32:
        return "its scales are float32, GGUF's are float16: quantize to the same format with :fp16"
    return None if matrix.plain else "it is no plain linear layer"


def _type(fmt: Format) -> str | None:
    if isinstance(fmt, MX):
        return "MXFP4" if fmt.name == "mxfp4" else None
    if not isinstance(fmt, Integer) or fmt.granularity != BLOCK or fmt.convention == "asym":
        return None
    offset = fmt.convention == "asym_float"
    return {(4, False): "Q4_0", (4, True): "Q4_1", (5, False): "Q5_0", (5, True): "Q5_1", (8, False): "Q8_0"}.get(
        (fmt.bits, offset)
    )


# ---- blocks


def blocks(fmt: Format, codes: Tensor, grid: Grid, name: str) -> Tensor:
    """Codes (out, in) and grid as GGUF's bytes (out, bytes) uint8. Raises PlanError for a scale that is no float16."""
    rows = len(codes)
    if isinstance(fmt, MX):
        parts = [encode_exponent(grid.scale).unsqueeze(-1), _nibbles(fmt.element.stored(codes))]
        return torch.cat(parts, dim=-1).view(rows, -1)
    assert isinstance(fmt, Integer)
    parts = [_bytes(as_float16(grid.scale, name, "GGUF's blocks"))]
    if fmt.convention == "asym_float":
        assert grid.zero is not None
        parts.append(_bytes(as_float16(grid.zero, name, "GGUF's blocks")))
    unsigned = fmt.element.stored(codes)
    if fmt.bits == 8:
        parts.append((unsigned.int() - 128).to(torch.int8).view(torch.uint8).view(rows, -1, BLOCK))
    else:
        if fmt.bits == 5:
            fifth = (unsigned >> 4).view(rows, -1, BLOCK)
            parts.append(torch.from_numpy(numpy.packbits(fifth.numpy(), axis=-1, bitorder="little")))
        parts.append(_nibbles(unsigned & 15))
    return torch.cat(parts, dim=-1).view(rows, -1)


def _bytes(values: Tensor) -> Tensor:
    """(out, groups) float16 -> (out, groups, 2) uint8"""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def _nibbles(codes: Tensor) -> Tensor:
    """(out, in) uint8 below 16 -> (out, blocks, 16): the first half of a block in the low nibbles, the second above."""
    halves = codes.view(codes.shape[0], -1, 2, BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


# ---- the file


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. kind: GGUF's name of its type; data() makes its bytes or values, expected() what the
    file must decode to.
    """

    name: str
    kind: str
    nbytes: int
    shape: tuple[int, ...]
    data: Callable[[], numpy.ndarray]
    expected: Callable[[], numpy.ndarray]


def write(model: Model, folder: OutputFolder, progress: Progress) -> None:
    """Write the one file, and decode every tensor of it with the package's own reader."""
    gguf = extra("gguf")
    entries = list(_entries(model, gguf))

    def save(path: Path) -> None:
        writer = gguf.GGUFWriter(path, getattr(gguf.MODEL_ARCH, _architecture(model)).name.lower())
        _describe(writer, model, gguf)
        for entry in entries:
            kind = getattr(gguf.GGMLQuantizationType, entry.kind)
            shape = gguf.quant_shape_to_byte_shape(entry.shape, kind) if entry.kind[0] != "F" else entry.shape
            element = numpy.dtype({"F16": "float16", "F32": "float32"}.get(entry.kind, "uint8"))
            writer.add_tensor_info(entry.name, shape, element, entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, entry in enumerate(entries):
            progress(entry.name, done, 2 * len(entries))
            writer.write_tensor_data(entry.data())
        writer.close()

    def verify(path: Path) -> dict[str, Any]:
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for done, entry in enumerate(entries):
            progress(entry.name, len(entries) + done, 2 * len(entries))
            tensor = read.get(entry.name)
            values = None if tensor is None else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if values is None or not numpy.array_equal(values.reshape(entry.shape), entry.expected()):
                raise VerificationError(f"{entry.name}: the gguf package reads other values: please report this")
        return {}

    if 0 not in folder.records:
        folder.add(0, FILE, [], save, verify, sum(entry.nbytes for entry in entries))


def _architecture(model: Model) -> str:
    return ARCHITECTURES[model.config["model_type"]][0]


def _names(model: Model, gguf: Any) -> Callable[[str], str | None]:
    """The checkpoint's name of a tensor -> GGUF's, or None."""
    blocks = model.config["num_hidden_layers"]
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _architecture(model)), blocks)
    return partial(table.get_name, try_suffixes=(".weight", ".bias"))


def _entries(model: Model, gguf: Any) -> Iterator[Entry]:
    names = _names(model, gguf)
    for matrix in model.matrices:
        yield _quantized(model, matrix, str(names(matrix.key)), gguf)
    stored = {name for matrix in model.matrices for name in matrix.names}
    for name in model.checkpoint.names():
        if name not in stored:
            yield _dense(model, name, str(names(name)))
    if (factors := _rope_factors(model)) is not None:
        values = factors.numpy()
        yield Entry("rope_freqs.weight", "F32", values.nbytes, values.shape, lambda: values, lambda: values)


def _quantized(model: Model, matrix: Matrix, name: str, gguf: Any) -> Entry:
    kind, order = _type(matrix.format), _order(model, matrix.key)
    assert kind is not None
    size, width = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind)]
    shape = matrix.target.shape

    def data() -> numpy.ndarray:
        named = matrix.named(model.checkpoint.tensors(matrix.names))
        packed = blocks(matrix.format, *matrix.format.unpack(named, shape), matrix.target.name)
        return packed[order].contiguous().numpy()

    def expected() -> numpy.ndarray:
        return matrix.decoded(model.checkpoint.tensors(matrix.names))[order].numpy()

    return Entry(name, kind, shape[0] * shape[1] // size * width, shape, data, expected)


def _dense(model: Model, key: str, name: str) -> Entry:
    shape, order = model.checkpoint.shape(key), _order(model, key)
    kind, dtype = ("F16", torch.float16) if len(shape) > 1 else ("F32", torch.float32)

    def data() -> numpy.ndarray:
        values = model.checkpoint.tensors([key])[key].to(dtype)
        if not torch.isfinite(values).all():
            raise PlanError(f"{key}: holds values beyond float16, in which GGUF would have it: quantize it, too")
        return values[order].contiguous().numpy()

    nbytes = model.checkpoint.nbytes(key) // model.checkpoint.dtype(key).itemsize * dtype.itemsize
    return Entry(name, kind, nbytes, shape, data, lambda: data().astype(numpy.float32))


def _order(model: Model, key: str) -> Tensor | slice:
    """The order of rows: Llama's queries and keys were trained with pairs side by side, which GGUF goes back to."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(key.split(".")[-2])
    if heads is None or not ARCHITECTURES[model.config["model_type"]][1]:
        return slice(None)
    count = model.config.get(heads) or model.config["num_attention_heads"]
    rows = model.skeleton.get_submodule(key.rpartition(".")[0]).get_parameter("weight").shape[0]
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).flatten()


def _rope_factors(model: Model) -> Tensor | None:
    """What the frequencies of plain rotary embeddings are divided by; None where they are plain."""
    parameters = model.config.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") == "default":
        return None
    found = next(value for name, value in model.skeleton.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    plain = parameters["rope_theta"] ** (-torch.arange(len(found)).double() / len(found))
    return (plain / found.double()).float()


def _describe(writer: Any, model: Model, gguf: Any) -> None:
    """What llama.cpp must know of the model, and its tokenizer."""
    config = model.config
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_name(str(model.facts.get("model", config["model_type"])))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokens = _tokenizer(model.checkpoint.folder)
    missing = config["vocab_size"] - len(tokens.texts)
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.split)
    writer.add_token_list([*tokens.texts, *(f"[PAD{n}]" for n in range(missing))])
    writer.add_token_types([*tokens.types, *[int(gguf.TokenType.UNUSED)] * missing])
    if tokens.scores is not None:
        writer.add_token_scores([*tokens.scores, *[-1e4] * missing])
    special = gguf.SpecialVocab(model.checkpoint.folder, load_merges=tokens.scores is None)
    if isinstance(config.get("bos_token_id"), int):
        special.special_token_ids.setdefault("bos", config["bos_token_id"])
    special.add_to_gguf(writer, quiet=True)


# ---- the tokenizer


@dataclass(frozen=True)
class Tokens:
    """model: llama.cpp's name of the algorithm; split: of the rule that cuts text before it; types: gguf.TokenType."""

    model: str
    split: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None


def _tokenizer(folder: Path) -> Tokens:
    """tokenizer.json, byte-level BPE or BPE with bytes to fall back on. Raises PlanError for any other."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PlanError(f"{folder}: has no tokenizer.json, and GGUF holds the tokenizer, too")
    content = json.loads(path.read_text())
    model = content["model"]
    if model["type"] != "BPE":
        raise PlanError(f"{path}: a {model['type']} tokenizer, and only BPE is written to GGUF here")
    vocabulary = dict(model["vocab"])
    added = {token["content"]: token for token in content.get("added_tokens", [])}
    vocabulary |= {text: token["id"] for text, token in added.items()}
    texts = sorted(vocabulary, key=lambda text: vocabulary[text])
    if [vocabulary[text] for text in texts] != list(range(len(texts))):
        raise PlanError(f"{path}: its token ids have gaps")
    kinds = extra("gguf").TokenType

    def kind(text: str) -> int:
        if text in added:
            unknown = text == model.get("unk_token")
            control = kinds.UNKNOWN if unknown else kinds.CONTROL
            return int(control if added[text]["special"] else kinds.USER_DEFINED)
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")
        return int(kinds.BYTE if is_byte else kinds.NORMAL)

    types = [kind(text) for text in texts]
    if model.get("byte_fallback"):
        return Tokens("llama", "default", texts, types, _scores(texts, model["merges"]))
    return Tokens("gpt2", _split(content.get("pre_tokenizer"), path), texts, types, None)


def _scores(texts: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece merges the pair of the highest score: that of a token is its place among the merges, negative."""
    places: dict[str, int] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), place)
    return [-float(places.get(text, 0)) for text in texts]


def _split(pre_tokenizer: dict[str, Any] | None, path: Path) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    regex = "".join(step.get("pattern", {}).get("Regex", "") for step in steps if step["type"] == "Split")
    if any(step["type"] not in ("Split", "ByteLevel") for step in steps) or regex not in SPLITS:
        raise PlanError(
            f"{path}: splits text in a way for which no name of llama.cpp's is known here: {regex or steps}"
        )
    return SPLITS[regex]
