"""The integer family and the bit streams, against exact rationals, brute force, bytes by hand and planted answers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant_kernels
from llmquant import formats
from llmquant.errors import LlmquantError, NonFiniteInput, PlanError, ScaleOverflow
from llmquant.formats.integer import CONVENTIONS, Integer
from llmquant.formats.packing import pack_bits, pack_words, unpack_bits, unpack_words

VECTORS = Path(__file__).parents[2] / "shared" / "vectors.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPECS = [
    f"int{bits}:{granularity}:{convention}"
    for bits in (2, 3, 4, 5, 8)
    for granularity in ("g32", "channel", "tensor")
    for convention in CONVENTIONS
]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


# ---- bit streams


def stream_by_hand(codes: list[int], bits: int) -> bytes:
    """One Python integer holds the whole stream."""
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    return whole.to_bytes(-(-len(codes) * bits // 8), "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 8, 9, 33, 172])
def test_bit_stream_is_one_little_endian_number(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (3, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    stream = pack_bits(codes, bits)
    assert [bytes(row.tolist()) for row in stream] == [stream_by_hand(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack_bits(stream, bits, n), codes)
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-n * bits // 32))
    assert torch.equal(unpack_words(words, bits, n), codes)


def test_bit_stream_of_strided_codes() -> None:
    codes = torch.randint(0, 8, (20, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 20), codes)


# ---- the published cases


def published(prefix: str) -> list[dict]:
    if not VECTORS.exists():
        return []
    return [case for case in json.loads(VECTORS.read_text())["cases"] if case["format"].startswith(prefix)]


@pytest.mark.skipif(not VECTORS.exists(), reason="the conformance file is not on this machine")
@pytest.mark.parametrize("case", published("int"), ids=lambda case: case["id"])
def test_published_integer_case(case: dict) -> None:
    p, expect = case["params"], case["expect"]
    fmt = Integer(p["bits"], p["group_size"], p["mode"], DTYPES[p["scale_dtype"]])
    w = torch.tensor([[float(value) for value in case["input"]]])
    if "error" in expect:
        with pytest.raises(LlmquantError) as caught:
            fmt.quantize(w, clip="minmax")
        assert type(caught.value).__name__ == expect["error"]
        return
    codes, grid = fmt.quantize(w, clip="minmax")
    assert codes[0].tolist() == expect.get("codes_float32", expect["codes"])
    assert grid.scale[0].tolist() == expect["scales"]
    if grid.zero is not None:
        assert grid.zero[0].tolist() == expect["zeros"]
    decoded = torch.tensor(expect.get("dequant_float32", expect["dequant"]), dtype=torch.float64)
    torch.testing.assert_close(fmt.decode(codes, grid)[0].double(), decoded, rtol=1e-6, atol=0)


@pytest.mark.skipif(not VECTORS.exists(), reason="the conformance file is not on this machine")
@pytest.mark.parametrize("case", published("granularity"), ids=lambda case: case["id"])
def test_published_granularity_case(case: dict) -> None:
    w = torch.tensor(case["input"])
    granularities: dict[str, int | str] = {
        "per_tensor": "tensor",
        "per_channel": "channel",
        "group2_rows": 2,
        "group": 3,
    }
    fmt = Integer(8, granularities[case["params"]["granularity"]], "sym", torch.float32)
    codes, grid = fmt.quantize(w, clip="minmax")
    assert codes.flatten().tolist() == case["expect"]["codes"]
    assert grid.scale.flatten().tolist() == case["expect"]["scales"]
    expected = torch.tensor(case["expect"]["dequant"], dtype=torch.float64)
    torch.testing.assert_close(fmt.decode(codes, grid).flatten().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(not VECTORS.exists(), reason="the conformance file is not on this machine")
@pytest.mark.parametrize("case", published("clip_search_mse"), ids=lambda case: case["id"])
def test_published_range_search_case(case: dict) -> None:
    p = case["params"]
    fmt = Integer(p["bits"], "channel", p["mode"], torch.float32)
    w = torch.tensor([case["input"]])
    grid = fmt.fit(w, clip="mse", norm=p["norm"])
    error = fmt.decode(fmt.encode(w, grid), grid).double() - w.double()
    assert error.abs().pow(p["norm"]).sum().item() == pytest.approx(case["expect"]["loss"], rel=1e-6)


@pytest.mark.skipif(not VECTORS.exists(), reason="the conformance file is not on this machine")
@pytest.mark.parametrize("case", published("pack_lsb_first"), ids=lambda case: case["id"])
def test_published_packing_case(case: dict) -> None:
    stream = pack_bits(torch.tensor([case["input"]], dtype=torch.uint8), case["params"]["bits"])
    assert bytes(stream[0].tolist()).hex() == case["expect"]["bytes_hex"]


# ---- laws


def test_worked_example() -> None:
    w = torch.tensor([[0.31, -1.27, 0.88, 0.05, -0.42, 1.5, -0.93, 0.66]])
    expected = {
        "sym": [1, -6, 4, 0, -2, 7, -4, 3],
        "sym_full": [-2, 7, -5, 0, 2, -8, 5, -4],
        "sym_gptq": [10, 2, 12, 8, 6, 15, 3, 11],
        "asym": [9, 0, 12, 7, 5, 15, 2, 11],
        "asym_float": [9, 0, 12, 7, 5, 15, 2, 10],
    }
    for convention, codes in expected.items():
        fmt = Integer(4, "channel", convention, torch.float32)
        assert fmt.quantize(w, clip="minmax")[0][0].tolist() == codes


@pytest.mark.parametrize("spec", SPECS)
def test_pack_unpack_is_identity_and_as_laid_out(spec: str) -> None:
    fmt = formats.get(spec).stored_for(torch.float32)
    w = weights(17, 75)
    codes, grid = fmt.quantize(w, clip="minmax")
    named = fmt.pack(codes, grid)
    layout = fmt.layout((17, 75))
    assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in named.items()} == {
        suffix: (what.shape, what.dtype) for suffix, what in layout.items()
    }
    again, again_grid = fmt.unpack(named, (17, 75))
    assert torch.equal(again, codes)
    assert torch.equal(again_grid.scale, grid.scale)
    assert (grid.zero is None) == (again_grid.zero is None)
    assert grid.zero is None or torch.equal(again_grid.zero, grid.zero)  # type: ignore[arg-type]
    stored = sum(t.numel() * t.element_size() for t in named.values())
    assert fmt.bits_per_weight((17, 75)) == pytest.approx(8 * stored / (17 * 75), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 9])
def test_few_rows_come_back_from_a_file(rows: int, tmp_path: Path) -> None:
    fmt = formats.get("int4:g16:asym")
    codes, grid = fmt.quantize(weights(rows, 80))
    save_file(fmt.pack(codes, grid), tmp_path / "weight.safetensors")
    named = load_file(tmp_path / "weight.safetensors")
    again, again_grid = fmt.unpack(named, (rows, 80))
    assert torch.equal(again, codes)
    assert grid.zero is not None
    assert torch.equal(again_grid.zero, grid.zero)  # type: ignore[arg-type]
    decoded = llmquant_kernels.decode(fmt.packed_weight(named, (rows, 80)), torch.float32)
    assert torch.equal(decoded, fmt.decode(codes, grid))


@pytest.mark.parametrize("spec", SPECS)
def test_encode_finds_the_nearest_level(spec: str) -> None:
    fmt = formats.get(spec).stored_for(torch.float32)
    w = weights(5, 75, seed=1)
    codes, grid = fmt.quantize(w, clip="mse")  # shrunk ranges, so that some values clip
    chosen = (fmt.decode(codes, grid) - w).abs()
    assert isinstance(fmt, Integer)
    best = torch.full_like(w, torch.inf)
    for code in range(fmt.element.lowest, fmt.element.highest + 1):
        level = fmt.decode(torch.full_like(codes, code), grid)
        best = torch.minimum(best, (level - w).abs())
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS)
def test_decoded_values_encode_to_themselves(spec: str) -> None:
    fmt = formats.get(spec).stored_for(torch.bfloat16)
    codes, grid = fmt.quantize(weights(6, 75, seed=2))
    decoded = fmt.decode(codes, grid)
    assert torch.equal(fmt.decode(fmt.encode(decoded, grid), grid), decoded)


@pytest.mark.parametrize("spec", ["int4:g32", "int3:g32:asym", "int2:channel", "int5:g48:asym_float", "int8:tensor"])
def test_any_run_of_columns_encodes_and_decodes_as_in_the_whole(spec: str) -> None:
    fmt = formats.get(spec)
    w = weights(4, 172, seed=3)
    codes, grid = fmt.quantize(w)
    decoded = fmt.decode(codes, grid)
    for start, stop in [(0, 172), (0, 1), (31, 33), (5, 140), (96, 128), (160, 172), (171, 172)]:
        part = grid.columns(start, stop)
        assert torch.equal(fmt.encode(w[:, start:stop], part), codes[:, start:stop])
        assert torch.equal(fmt.decode(codes[:, start:stop], part), decoded[:, start:stop])
        inner = grid.columns(start // 2, stop).columns(start - start // 2, stop - start // 2)
        assert torch.equal(fmt.decode(codes[:, start:stop], inner), decoded[:, start:stop])


# Not sym_gptq: the scale it picks never holds its own largest magnitude, which lies on a tie.
@pytest.mark.parametrize("convention", ["sym_full", "sym", "asym", "asym_float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", ["search", "minmax"])
def test_planted_weights_come_back_with_no_loss(bits: int, convention: str, clip: str) -> None:
    fmt = Integer(bits, 16, convention, torch.float16)
    generator = torch.Generator().manual_seed(bits)
    lowest, highest = fmt.element.lowest, fmt.element.highest
    codes = torch.randint(lowest, highest + 1, (8, 64), generator=generator).float()
    codes[:, ::16], codes[:, 1::16] = lowest, highest  # the grid is used to its ends
    middle = 2 ** (bits - 1) if convention == "asym" else 0
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0]).repeat_interleave(16)
    planted = (codes - middle) * scale + (3.0 if convention == "asym_float" else 0.0)
    found, grid = fmt.quantize(planted, clip=clip)
    assert torch.equal(fmt.decode(found, grid), planted)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("convention", ["sym_full", "sym", "asym", "asym_float"])
def test_search_beats_the_plain_range_and_weights_count(bits: int, convention: str) -> None:
    fmt = Integer(bits, 32, convention)
    w = weights(64, 128, seed=4)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(5)).pow(4) + 1e-3

    def loss(clip: str, h: Tensor | None) -> float:
        codes, grid = fmt.quantize(w, h, clip=clip)
        return float(((fmt.decode(codes, grid) - w).double().square() * importance).sum())

    assert loss("search", importance) < loss("search", None) < loss("minmax", None)


@pytest.mark.parametrize("clip", ["percentile", "kl", "mse"])
def test_other_range_rules_clip_outliers(clip: str) -> None:
    fmt = Integer(4, "channel", "sym")
    w = weights(3, 4096, seed=6)
    w[:, 7] = 2.0  # 40 standard deviations
    plain, clipped = fmt.fit(w, clip="minmax").scale, fmt.fit(w, clip=clip).scale
    assert (clipped < 0.5 * plain).all()


def test_range_search_finds_the_least_loss_of_its_grid() -> None:
    """Against an exhaustive search in exact rational arithmetic."""
    w = weights(1, 8, seed=7)
    fmt = Integer(3, 8, "sym", torch.float32)
    grid = fmt.fit(w, clip="mse")
    values = [Fraction(v) for v in w[0].tolist()]
    reach = max(abs(v) for v in values)
    losses = []
    for i in range(80):
        scale = Fraction(torch.tensor(float(reach * (100 - i) / 300), dtype=torch.float32).item())
        levels = [max(-3, min(3, round(v / scale))) * scale for v in values]
        losses.append(sum((a - b) ** 2 for a, b in zip(values, levels, strict=True)))
    found = (fmt.decode(fmt.encode(w, grid), grid) - w).double().square().sum().item()
    assert found == pytest.approx(float(min(losses)), rel=1e-4)


def test_ragged_last_group_is_stored_whole_with_the_code_of_zero() -> None:
    fmt = Integer(4, 32, "asym", torch.float16)
    codes, grid = fmt.quantize(weights(3, 40, seed=8))
    stored = unpack_words(fmt.pack(codes, grid)["weight_packed"], 4, 64)
    assert grid.zero is not None
    assert torch.equal(stored[:, 40:].float(), grid.zero[:, 1:].expand(3, 24))


def test_statistics_of_a_short_group_see_no_padding() -> None:
    w = torch.full((1, 40), 5.0)
    w[0, 32:] = torch.linspace(5.0, 5.7, 8)
    codes, grid = Integer(3, 32, "asym_float", torch.float32).quantize(w, clip="minmax")
    assert grid.zero is not None
    assert grid.zero[0].tolist() == [5.0, 5.0]
    assert codes[0, 32:].tolist() == list(range(8))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    w = weights(600, 1024, seed=9)
    fmt = formats.get("int3:g128")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(fmt.quantize(w))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codes, results[0][0]) for codes, _ in results)
    assert all(torch.equal(grid.scale, results[0][1].scale) for _, grid in results)
    assert torch.get_num_threads() == threads


# ---- names and errors


@pytest.mark.parametrize(
    "spec", ["int4:g128", "int8:channel", "int3:g64:asym", "int2:tensor:sym:fp32", "int5:g32:asym_float:bf16"]
)
def test_spec_round_trip(spec: str) -> None:
    assert formats.get(spec).spec == spec
    assert formats.get(formats.get(spec).spec) == formats.get(spec)


def test_scale_type_follows_the_weight_unless_named() -> None:
    assert formats.get("int4:g128").stored_for(torch.bfloat16).spec == "int4:g128:bf16"
    assert formats.get("int4:g128").stored_for(torch.float32).spec == "int4:g128:fp16"
    assert formats.get("int4:g128:fp32").stored_for(torch.bfloat16).spec == "int4:g128:fp32"


@pytest.mark.parametrize("spec", ["int9", "int1:g32", "int4:g0", "int4:gx", "int4:g32:nonsense", "float4", "", "int4:"])
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(PlanError):
        formats.get(spec)


def test_group_larger_than_the_row_is_refused() -> None:
    with pytest.raises(PlanError, match=r"group 128 is larger than a row of 64.*g64"):
        formats.get("int4:g128").layout((8, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_index(bad: float) -> None:
    w = weights(4, 64)
    w[2, 5] = bad
    with pytest.raises(NonFiniteInput, match=r"\[2, 5\]"):
        formats.get("int4:g32").fit(w)


def test_opposite_infinities_do_not_hide_each_other() -> None:
    w = weights(4, 64)
    w[1, 1], w[3, 3] = torch.inf, -torch.inf
    with pytest.raises(NonFiniteInput, match=r"inf at \[1, 1\], 2 non-finite"):
        formats.get("int4:g32").fit(w)


def test_scale_beyond_float16_is_refused_with_the_remedy() -> None:
    w = weights(4, 64)
    w[1, 40] = 3e7
    for clip in ("search", "minmax"):
        with pytest.raises(ScaleOverflow, match=r"row 1, group 1 .*int4:g32:fp32"):
            formats.get("int4:g32").fit(w, clip=clip)


def test_all_zero_and_denormal_groups_become_zeros() -> None:
    w = torch.zeros(2, 64)
    w[1, :32] = 1e-41
    for convention in ("sym", "sym_full", "sym_gptq", "asym"):
        codes, grid = Integer(4, 32, convention, torch.float16).quantize(w)
        assert (grid.scale == 1).all()
        assert (Integer(4, 32, convention, torch.float16).decode(codes, grid) == 0).all()


# ---- what others read


@pytest.mark.parametrize(
    "spec", ["int4:g32", "int8:channel", "int3:g64", "int2:g32:sym", "int5:g32:sym_gptq", "int8:g32"]
)
def test_symmetric_integers_are_the_bytes_of_compressed_tensors(spec: str) -> None:
    """Unpacked and dequantized by that package's own functions."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    fmt = formats.get(spec).stored_for(torch.bfloat16)
    w = weights(24, 128, seed=10)
    codes, grid = fmt.quantize(w)
    named = fmt.pack(codes, grid)
    assert isinstance(fmt, Integer)
    theirs = helpers.unpack_from_int32(named["weight_packed"], fmt.bits, torch.Size(named["weight_shape"].tolist()))
    scale = named["weight_scale"].float().repeat_interleave(128 // named["weight_scale"].shape[1], dim=1)
    assert torch.equal(theirs.float() * scale, fmt.decode(codes, grid))


@pytest.mark.parametrize("spec", ["int4:g32:asym", "int3:g64:asym", "int8:channel:asym"])
def test_zero_points_are_packed_along_the_rows_as_in_compressed_tensors(spec: str) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    fmt = formats.get(spec).stored_for(torch.bfloat16)
    codes, grid = fmt.quantize(weights(24, 128, seed=11))
    named = fmt.pack(codes, grid)
    assert isinstance(fmt, Integer)
    assert grid.zero is not None
    shape = torch.Size(grid.zero.shape)
    theirs = helpers.unpack_from_int32(named["weight_zero_point"], fmt.bits, shape, packed_dim=0)
    assert torch.equal(theirs.float() + 2 ** (fmt.bits - 1), grid.zero)  # they count from the middle


# ---- bytes that must never change

GOLDEN = Path(__file__).parent / "golden" / "integer.json"


def golden_example(spec: str) -> dict[str, str]:
    """Suffix -> hexadecimal bytes of codes and a grid that follow a simple pattern, 5 rows of 40."""
    fmt = formats.get(spec)
    assert isinstance(fmt, Integer)
    span = fmt.element.highest - fmt.element.lowest + 1
    codes = (torch.arange(200).view(5, 40) * 7 % span + fmt.element.lowest).to(
        torch.uint8 if fmt.element.lowest == 0 else torch.int8
    )
    layout = fmt.layout((5, 40))
    groups = layout["weight_scale"].shape[-1] if fmt.granularity != "tensor" else 1
    rows = 1 if fmt.granularity == "tensor" else 5
    scale = (torch.arange(rows * groups).view(rows, groups) + 1) / 64
    zero = None if fmt._signed else torch.arange(rows * groups).view(rows, groups) % span * 1.0
    group = fmt.granularity if isinstance(fmt.granularity, int) else 40
    named = fmt.pack(codes, formats.Grid(scale, zero, group))
    return {suffix: bytes(t.reshape(-1).clone().view(torch.uint8).tolist()).hex() for suffix, t in named.items()}


@pytest.mark.parametrize("spec", json.loads(GOLDEN.read_text()))
def test_files_written_by_earlier_versions_stay_readable(spec: str) -> None:
    assert golden_example(spec) == json.loads(GOLDEN.read_text())[spec]
