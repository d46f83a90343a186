"""Whatever the files say: an answer or one clear error, soon, in little memory, and nothing outside the folder.

500 cases by default. `LLMQUANT_FUZZ=20000 pytest tests/test_hostile.py` tries as many, from another seed each time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmquant
import llmquant_kernels
from llmquant import formats, inspection, metrics, pipeline, verification
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import INDEX, MANIFEST, Checkpoint
from llmquant.errors import CheckpointError, DataError, LlmquantError, VerificationError
from llmquant.output import JOURNAL, OutputFolder
from llmquant.recipe import Recipe
from llmquant.text import read_documents

CASES = int(os.environ.get("LLMQUANT_FUZZ", "500"))
SECONDS = 20.0  # of a processor that any single case may take
ROOM = 2**31  # bytes that it may ask for beyond what the process has
# The targets by what a case costs, and the share of the cases that each gets.
SHARES = {"text": 0.5, "folder": 0.35, "model": 0.15}


def cases(kind: str, targets: int) -> Any:
    count = max(1, round(CASES * SHARES[kind] / targets))
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=CASES == 500,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def watched() -> Iterator[None]:
    """Time and memory are bounded, and no error but those of llmquant passes for an answer."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    start = time.process_time()
    try:
        yield
    except LlmquantError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < SECONDS


# ---- what is thrown at it

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**31 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, -1, 0]),
    st.floats(allow_nan=True, allow_infinity=True),
)
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "\x00", "weight", "int4:g64", "llama"]),
    st.sampled_from(["torch.load", "float16", "PreTrainedModel", "BertModel", "eager", "someone/kernels"]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)
NESTS = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"{}", b"[]", b"null", b"\xff\xfe", b""])


def places(nest: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a nest of dictionaries and lists."""
    yield path
    if isinstance(nest, dict | list):
        for key, inner in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from places(inner, (*path, key))


def put(nest: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    """A copy of a nest with another value in one place, or without it, or with one more beside it."""
    if not path:
        return value
    nest = json.loads(json.dumps(nest))
    inner = nest
    for key in path[:-1]:
        inner = inner[key]
    if how == "drop":
        del inner[path[-1]]
    elif how == "add" and isinstance(inner, dict):
        inner[str(value)[:20]] = value
    else:
        inner[path[-1]] = value
    return nest


def mutated(original: Any) -> st.SearchStrategy[bytes]:
    """JSON files that are nearly this one."""
    spots = list(places(original))
    change = st.tuples(st.sampled_from(spots), JSON, st.sampled_from(["replace", "replace", "drop", "add"]))
    whole = change.map(lambda drawn: json.dumps(put(original, *drawn)).encode())
    text = json.dumps(original).encode()
    return st.one_of(whole, whole, whole, bitten(text), NESTS)


def bitten(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few of them changed, or cut short, or with more behind."""
    spot = st.integers(0, max(0, len(data) - 1))
    flips = st.lists(st.tuples(spot, st.integers(0, 255)), min_size=1, max_size=4)

    def flipped(drawn: list[tuple[int, int]]) -> bytes:
        found = bytearray(data)
        for place, value in drawn:
            found[place] = value
        return bytes(found)

    return st.one_of(
        flips.map(flipped), spot.map(lambda end: data[:end]), st.binary(max_size=9).map(lambda b: data + b)
    )


def forged_header(shard: bytes) -> st.SearchStrategy[bytes]:
    """safetensors files whose header lies: about its length, or about a tensor."""
    (length,) = struct.unpack("<Q", shard[:8])
    header = json.loads(shard[8 : 8 + length])

    def built(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + shard[8 + length :]

    lengths = st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1])
    types = st.sampled_from(["F64", "F4", "F8_E8M0", "C64", "BOOL", "U16", "I4", "bf16"])
    names = st.sampled_from(sorted(set(header) - {"__metadata__"}))

    def retyped(drawn: tuple[str, str]) -> bytes:
        return built(json.dumps({**header, drawn[0]: {**header[drawn[0]], "dtype": drawn[1]}}).encode())

    return st.one_of(
        mutated(header).map(built),
        lengths.map(lambda n: struct.pack("<Q", n) + shard[8:]),
        st.tuples(names, types).map(retyped),
        bitten(shard[: 8 + length]).map(lambda head: head + shard[8 + length :]),
    )


# ---- the folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hostile") / "model", "llama", max_shard_size="100KB")


@pytest.fixture(scope="module")
def quantized(model: Path) -> Path:
    job = pipeline.Job(str(model), Recipe.uniform("int4:g48"), None)
    pipeline.quantize(pipeline.prepare(job, model.parent / "out"), model.parent / "out")
    return model.parent / "out"


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def read_dense(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.config()
    for name in checkpoint.names():
        assert checkpoint.nbytes(name) >= 0
    checkpoint.tensors(checkpoint.names())
    metrics.stored_size(folder)


def read_model(folder: Path) -> None:
    model = StreamedModel(Checkpoint(folder))
    model.targets(0)
    model.load_block(0)


def read_quantized(folder: Path) -> None:
    metrics.stored_size(folder)
    inspection.verify(folder)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


# ---- the targets


@cases("folder", 5)
@given(data=st.data())
def test_index(data: st.DataObject, model: Path) -> None:
    path = model / INDEX
    with replaced(path, data.draw(mutated(json.loads(path.read_text())))), watched():
        read_dense(model)


@cases("folder", 5)
@given(data=st.data())
def test_safetensors_header(data: st.DataObject, model: Path) -> None:
    path = first_shard(model)
    with replaced(path, data.draw(forged_header(path.read_bytes()))), watched():
        read_dense(model)


@cases("folder", 5)
@given(data=st.data())
def test_manifest(data: st.DataObject, quantized: Path) -> None:
    path = quantized / MANIFEST
    facts = json.loads(path.read_text())
    facts["tensors"] = facts["tensors"][:2]  # for speed
    with replaced(path, data.draw(mutated(facts))), watched():
        read_quantized(quantized)


@cases("folder", 5)
@given(data=st.data())
def test_shard_of_a_quantized_folder(data: st.DataObject, quantized: Path) -> None:
    path = first_shard(quantized)
    with replaced(path, data.draw(forged_header(path.read_bytes()))), watched():
        read_quantized(quantized)


@cases("folder", 5)
@given(data=st.data())
def test_journal(data: st.DataObject, quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder is taken up, or refused, or begun anew; no file beside it is touched or believed."""
    folder = tmp_path_factory.mktemp("journal") / "out"
    partial = folder.with_name("out.partial")
    partial.mkdir()
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(b"not yours")
    shard = shutil.copy(first_shard(quantized), partial)
    run = {"seed": 1, "recipe": [{"pattern": "*"}]}
    names = ["a.weight"]
    record = {"part": 0, "shard": Path(shard).name, "sha256": "0", "bytes": 1, "tensors": names, "report": []}
    lines = [json.dumps(run).encode(), data.draw(mutated(record)), data.draw(mutated({**record, "part": 1}))]
    (partial / JOURNAL).write_bytes(b"\n".join(data.draw(st.permutations(lines))))
    with watched(), OutputFolder(folder, run) as taken:
        assert all((partial / record["shard"]).parent == partial for record in taken.records.values())
        assert all((partial / record["shard"]).is_file() for record in taken.records.values())
    assert outside.read_bytes() == b"not yours"
    shutil.rmtree(folder.parent)


@cases("model", 3)
@given(data=st.data())
def test_config(data: st.DataObject, model: Path) -> None:
    path = model / "config.json"
    with replaced(path, data.draw(mutated(json.loads(path.read_text())))), watched():
        read_model(model)


@cases("model", 3)
@given(data=st.data())
def test_quantization_config(data: st.DataObject, quantized: Path) -> None:
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    changed = data.draw(mutated(config["quantization_config"]))
    try:
        config["quantization_config"] = json.loads(changed)
    except (ValueError, RecursionError):
        config = None
    with replaced(path, changed if config is None else json.dumps(config).encode()), watched():
        llmquant.load(quantized)


@cases("model", 3)
@given(data=st.data())
def test_loading(data: st.DataObject, quantized: Path) -> None:
    path = data.draw(st.sampled_from([quantized / INDEX, quantized / "config.json", first_shard(quantized)]))
    changed = forged_header if path.suffix == ".safetensors" else lambda raw: mutated(json.loads(raw))
    with replaced(path, data.draw(changed(path.read_bytes()))), watched():
        llmquant.load(quantized)


RECIPE = [
    {"pattern": "*.mlp.*", "format": "int3:g64", "solver": "gptq", "options": {"damp": 0.1, "rounds": 1}},
    {"pattern": "*", "format": None},
]


@cases("text", 4)
@given(changed=mutated(RECIPE), calibrated=st.booleans())
def test_recipe(changed: bytes, calibrated: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    path.write_bytes(changed)
    with watched():
        Recipe.read(path).settled(calibrated).check(["model.layers.0.mlp.up_proj", "lm_head"], calibrated)


SPECS = ["int4:g128:asym", "mxfp4:floor", "vsq4:s6:bf16", "nf4:g64:dq", "table:-1,-0.4,0,0.3,1:g32", "kmeans3:channel"]
TOKENS = [
    *"g:,-.1e9",
    "g0",
    "g99999999999999999999",
    "nan",
    "inf",
    "tensor",
    "int",
    "table",
    "²",
    "٣",
    "\n",
    "9" * 5000,
]


@cases("text", 4)
@given(spec=st.one_of(st.text(max_size=20), st.sampled_from(SPECS), *[bitten(s.encode()).map(repr) for s in SPECS]),
       more=st.lists(st.sampled_from(TOKENS), max_size=4),
       shape=st.tuples(st.integers(1, 2**40), st.integers(1, 2**40)))  # fmt: skip
def test_format_names(spec: str, more: list[str], shape: tuple[int, int]) -> None:
    with watched():
        fmt = formats.get(spec + "".join(more))
        assert formats.get(fmt.spec) == fmt
        assert fmt.bits_per_weight(shape) > 0


@cases("text", 4)
@given(
    data=st.data(), spec=st.sampled_from([*SPECS, "int3:g24", "ternary:g24", "binary:g24", "nvfp4", "mx6", "fp8_e5m2"])
)
def test_any_bytes_decode_or_are_refused(data: st.DataObject, spec: str) -> None:
    """Codes that are never written, and scales that are no numbers, in the tensors of a matrix; also in the kernels."""
    fmt, shape = formats.get(spec).stored_for(torch.float32), (3, 144)
    named = {}
    for suffix, wanted in fmt.layout(shape).items():
        raw = data.draw(st.binary(min_size=wanted.nbytes, max_size=wanted.nbytes))
        named[suffix] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(wanted.dtype).view(wanted.shape)
    with watched():
        assert fmt.decode(*fmt.unpack(named, shape)).shape == shape
    for dtype in (torch.float32, torch.bfloat16):
        with watched():
            weight = fmt.packed_weight(named, (3, 144))
            assert llmquant_kernels.decode(weight, dtype).shape == shape
            prepared = llmquant_kernels.prepare(weight, dtype=dtype)
            assert llmquant_kernels.linear(torch.ones(2, 144, dtype=dtype), prepared).shape == (2, 3)


@cases("text", 4)
@given(
    changed=mutated([{"text": "a"}, "b", {"text": "c", "more": [1]}]), kind=st.sampled_from(["json", "jsonl", "txt"])
)
def test_texts(changed: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"text.{kind}"
    path.write_bytes(changed)
    with watched():
        assert all(isinstance(text, str) for text in read_documents(str(path)))


# ---- named attacks


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


@pytest.mark.parametrize("escape", ["../secret.safetensors", "/tmp/secret.safetensors", "..", "sub/secret.safetensors"])
def test_an_index_cannot_name_files_elsewhere(escape: str, model: Path, copy: Path) -> None:
    for folder, door in ((Path(shutil.copytree(model, copy.parent / "dense")), read_dense), (copy, llmquant.load)):
        shutil.copy(first_shard(folder), folder.parent / "secret.safetensors")
        edit(folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], escape)))
        with pytest.raises(CheckpointError, match="is no name of a file in this folder"):
            door(folder)


def test_a_manifest_cannot_name_files_elsewhere(copy: Path) -> None:
    edit(copy / MANIFEST, lambda facts: facts["files"].update({"../secret": {"sha256": "0", "bytes": 1}}))
    with pytest.raises(CheckpointError, match=r"'../secret' is not the entry of a file in this folder"):
        inspection.verify(copy)


def test_code_that_comes_with_a_model_is_not_run(model: Path, copy: Path) -> None:
    dense = Path(shutil.copytree(model, copy.parent / "dense"))
    for folder in (dense, copy):
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n" * 2)
        where = {name: f"evil.{kind}" for name, kind in (("AutoConfig", "C"), ("AutoModelForCausalLM", "M"))}
        edit(folder / "config.json", lambda config, where=where: config.update(auto_map=where))  # type: ignore[misc]
    with watched():
        read_model(dense)
    with watched():
        llmquant.load(copy)
    edit(dense / "config.json", lambda config: config.update(model_type="evil"))
    with pytest.raises(LlmquantError, match="it brings its own code"):
        read_model(dense)
    edit(copy / "config.json", lambda config: config.update(model_type="evil"))
    with pytest.raises(LlmquantError):
        llmquant.load(copy)
    edit(copy / "config.json", lambda config: config.update(model_type="llama", attn_implementation="someone/kernels"))
    with pytest.raises(CheckpointError, match="is code from elsewhere"):
        llmquant.load(copy)
    assert not list(copy.parent.rglob("ran"))


def test_a_folder_of_pickles_is_refused(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickles"
    folder.mkdir()
    shutil.copy(quantized / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    for door in (read_dense, llmquant.load):
        with pytest.raises(CheckpointError, match="can run code"):
            door(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("head_dim", 10**12), ("hidden_size", 2**40), ("vocab_size", 10**15)],
)
def test_a_config_cannot_ask_for_more_than_is_stored(key: str, value: int, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with watched(), pytest.raises(CheckpointError, match=f"{key} is {value}"):
        read_model(folder)


def test_every_error_says_what_to_blame(copy: Path, model: Path) -> None:
    shard = first_shard(copy)
    with replaced(shard, shard.read_bytes()[:-9]), pytest.raises(CheckpointError, match=shard.name):
        llmquant.load(copy)
    with replaced(copy / MANIFEST, b"["), pytest.raises(CheckpointError, match=rf"{MANIFEST}: not JSON"):
        inspection.verify(copy)
    text = copy / "text.json"
    text.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"text\.json: not JSON"):
        read_documents(str(text))
    edit(copy / "config.json", lambda config: config["quantization_config"].update(formats={"int4:g48": ["nothing"]}))
    with pytest.raises(VerificationError, match="nothing is quantized, but the reference has no such matrix"):
        verification.Decoded(copy, StreamedModel(Checkpoint(model)))
