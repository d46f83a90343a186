"""Every number format: published cases, laws, exact references, what another package reads, and bytes of the file."""

from __future__ import annotations

import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant_kernels
from llmquant import formats
from llmquant.errors import LlmquantError, NonFiniteInput, PlanError, ScaleOverflow
from llmquant.formats import clustering, packing
from llmquant.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, Float, Table, Whole
from llmquant.formats.nvfp4 import NVFP4
from llmquant.formats.scalar import Scalar

VECTORS = Path(__file__).parents[2] / "shared" / "vectors.json"
GOLDEN = Path(__file__).parent / "golden" / "families.json"
FLOATS = {"e4m3": E4M3, "e5m2": E5M2, "e3m2": E3M2, "e2m3": E2M3, "e2m1": E2M1}
SPECS = [
    "int4:g32",
    "int3:g32:asym",
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "mxfp4:floor", "mxfp6_e2m3:rceil"),
    *("nvfp4", "mx9", "mx6", "mx4"),
    *("vsq3:s4", "vsq4:s4", "vsq6:s5", "vsq8:s6"),
    *("fp8_e4m3:channel", "fp8_e5m2:tensor", "fp8_e4m3:block", "fp8_e4m3:g32:bf16"),
    *("nf4:g64", "nf4:g32:fp32", "nf4:g32:dq", "table:-1,-0.3,0.2,1:g32", "table:-1,0,1:channel"),
    *("kmeans2:channel", "kmeans4:channel", "kmeans3:g32", "kmeans4:tensor"),
    *("ternary:g32", "ternary:channel:twn", "ternary:tensor:absmean", "binary:g32", "binary:channel"),
]


def settled(spec: str) -> Scalar:
    fmt = formats.get(spec).stored_for(torch.float32)
    assert isinstance(fmt, Scalar)
    return fmt


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def all_codes(fmt: Scalar) -> list[int]:
    element = fmt.element
    if isinstance(element, Whole):
        return [code for code in range(element.lowest, element.highest + 1) if element.bits > 1 or code]
    if isinstance(element, Table):
        return list(range(len(element.values)))
    return [code for code in range(2**element.bits) if torch.isfinite(element.table()[code])]


# ---- the published cases


def published() -> list[dict[str, Any]]:
    if not VECTORS.exists():
        return []
    others = ("int", "pack_lsb", "clip_search", "granularity", "activation", "seed")
    cases = json.loads(VECTORS.read_text())["cases"]
    return [case for case in cases if not case["format"].startswith(others)]


def named_by(case: dict[str, Any]) -> formats.Format:
    name, p = case["format"], case["params"]
    if name.startswith(("mxfp", "mxint")):
        return formats.get(f"{name.removesuffix('_e2m1')}:{p['scale_mode']}")
    family = name.split("_")[0]
    spec = {
        "fp8": lambda: f"fp8_{p['element']}:g{p['group_size']}",
        "vsquant": lambda: f"vsq{p['bits']}:s{p['scale_bits']}:fp32",
        "nf4": lambda: f"nf4:g{p['block']}:fp32",
        "kmeans": lambda: f"kmeans{int(math.log2(p['k']))}:channel:fp32",
        "ternary": lambda: f"ternary:g{p['group_size']}:{name.split('_')[-1]}:fp32",
        "binary": lambda: f"binary:g{p['group_size']}:fp32",
    }
    return formats.get(spec[family]() if family in spec else name)


def numbers(values: Any) -> Tensor:
    found = torch.tensor([float(value) for row in values for value in (row if isinstance(row, list) else [row])])
    return found.view(len(values), -1) if isinstance(values[0], list) else found.view(1, -1)


@pytest.mark.skipif(not VECTORS.exists(), reason="the conformance file is not on this machine")
@pytest.mark.parametrize("case", published(), ids=lambda case: case["id"])
def test_published_case(case: dict[str, Any]) -> None:
    name, expect = case["format"], case["expect"]
    if name == "pack_ternary_base3":
        stream = packing.pack_trits(torch.tensor([case["input"]]).add(1).to(torch.uint8))
        assert bytes(stream[0].tolist()).hex() == expect["bytes_hex"]
        return
    w = numbers(case["input"])
    if name.endswith("_cast"):
        if "error" not in expect:  # an element has no say in what is finite: its format refuses
            element = FLOATS[case["params"]["element"]]
            codes = element.codes(w)
            assert codes[0].tolist() == expect["codes"]
            assert element.levels(codes)[0].tolist() == [float(value) for value in expect["dequant"]]
        return
    fmt = named_by(case)
    assert isinstance(fmt, Scalar)
    weighted = case["params"].get("weights")
    importance = None if weighted is None else torch.tensor(weighted)
    clip = "search" if "scale_mode" in case["params"] else "minmax"
    if "error" in expect:
        with pytest.raises(LlmquantError) as caught:
            fmt.quantize(w, importance, clip=clip)
        assert type(caught.value).__name__ == expect["error"]
        return
    if isinstance(fmt, NVFP4) and case["params"]["tensor_scale"]:
        grid = fmt.fit(w, clip=clip, tensor_scale=case["params"]["tensor_scale"])
        codes = fmt.encode(w, grid)
    else:
        codes, grid = fmt.quantize(w, importance, clip=clip)
    assert codes.flatten().tolist() == expect["codes"]
    decoded = fmt.decode(codes, grid).double()
    torch.testing.assert_close(decoded, numbers(expect["dequant"]).double().view_as(decoded), rtol=1e-6, atol=1e-44)
    check_grid(fmt, codes, grid, expect)


def check_grid(fmt: Scalar, codes: Tensor, grid: formats.Grid, expect: dict[str, Any]) -> None:
    """Scales as values and, where the case has them, as bytes of the file."""
    named = fmt.pack(codes, grid)
    stored = named.get("weight_scale", torch.empty(0)).view(torch.uint8)
    for key in ("scale_bytes_e8m0", "scale_bytes_e4m3", "exponent_bytes"):
        if key in expect:
            assert stored.flatten().tolist() == expect[key]
    if "microexponents" in expect:
        bits = packing.unpack_bits(named["weight_micro_exponent"], 1, len(expect["microexponents"]))
        assert bits[0].tolist() == expect["microexponents"]
    if "scales" in expect:
        assert grid.scale.flatten().tolist() == expect["scales"]
    if "channel_scales" in expect:
        assert named["weight_channel_scale"].flatten().tolist() == expect["channel_scales"]
    if "tensor_scale" in expect:
        assert grid.outer is not None
        assert grid.outer.item() == pytest.approx(expect["tensor_scale"], rel=1e-7)
    if "codebook" in expect:
        assert grid.levels is not None
        assert grid.levels[0].tolist() == pytest.approx(expect["codebook"], rel=1e-6)


# ---- elements, against exact arithmetic


def float_levels(exponent: int, mantissa: int, bias: int, largest: float) -> list[Fraction]:
    """By code, from the definition."""
    levels = []
    for e, m in itertools.product(range(2**exponent), range(2**mantissa)):
        value = Fraction(2**mantissa + m if e else m, 2**mantissa) * Fraction(2) ** (max(e, 1) - bias)
        levels.append(value)
    return [value for value in levels if value <= largest]


@pytest.mark.parametrize("element", FLOATS.values(), ids=lambda element: element.name)
def test_floats_round_to_the_nearest_level_and_ties_to_the_even_code(element: Float) -> None:
    levels = float_levels(element.exponent, element.mantissa, element.bias, element.largest)
    assert float(levels[-1]) == element.largest
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    values = [float(v) for v in levels + middles] + torch.linspace(0, 1.3 * element.largest, 999).tolist()
    exact = torch.tensor(values)
    x = torch.cat([exact, exact.nextafter(torch.tensor(torch.inf)), exact.nextafter(torch.tensor(0.0))])
    wanted = []
    for value in (Fraction(v) for v in x.tolist()):
        code = min(range(len(levels)), key=lambda c: (abs(levels[c] - value), c % 2))
        wanted.append(code)
    assert element.codes(x).tolist() == wanted
    assert element.round(x).tolist() == [float(levels[code]) for code in wanted]
    negative = element.codes(-x) - 2 ** (element.bits - 1)
    assert negative.tolist() == wanted


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda element: element.name)
def test_floats_of_eight_bits_are_those_of_torch(element: Float) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * element.largest / 4
    x = x.clamp(-element.largest, element.largest)
    assert element.cast is not None
    assert torch.equal(element.round(x), x.to(element.cast).float())
    theirs = torch.arange(256, dtype=torch.uint8).view(element.cast).float()
    ours = element.table()
    assert torch.equal(ours[ours.isfinite()], theirs[theirs.isfinite()])
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize(
    "element", [Table((-1.0, -0.5, 0.25, 1.0)), Table((0.0, 1e-6, 2e-6, 1.0)), Table(tuple(range(-100, 156)))]
)
def test_tables_find_the_nearest_level_and_ties_go_down(element: Table) -> None:
    levels = torch.tensor(element.values)
    middles = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    x = torch.cat([levels, middles, middles.nextafter(torch.tensor(1e9)), torch.linspace(-200, 200, 5001)])
    assert torch.equal(element.codes(x).long(), torch.bucketize(x, middles))


@pytest.mark.parametrize("storage", ["offset", "twos_complement", "sign_magnitude"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_stored_and_found_again(storage: str, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    element = Whole(bits, -top, top, storage)
    codes = torch.arange(-top, top + 1).to(torch.int8)
    stored = element.stored(codes)
    assert stored.dtype == torch.uint8
    by_hand = {
        "offset": lambda q: q + top + 1,
        "twos_complement": lambda q: q % 2**bits,
        "sign_magnitude": lambda q: abs(q) + (2 ** (bits - 1) if q < 0 else 0),
    }
    assert stored.tolist() == [by_hand[storage](q) for q in codes.tolist()]
    assert torch.equal(element.unstored(stored), codes)


def test_trits_are_five_to_the_byte() -> None:
    digits = torch.randint(0, 3, (4, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stream = packing.pack_trits(digits)
    assert stream.shape == (4, 7)
    by_hand = [sum(d * 3**j for j, d in enumerate(row[5:10])) for row in digits.tolist()]
    assert stream[:, 1].tolist() == by_hand
    assert torch.equal(packing.unpack_trits(stream, 33), digits)


# ---- laws


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(5, 75), (1, 128), (130, 33), (3, 1)])
def test_files_hold_what_was_solved(spec: str, shape: tuple[int, int], tmp_path: Path) -> None:
    fmt = settled(spec)
    if isinstance(fmt.granularity, int) and fmt.granularity > shape[1] and not fmt.spec.startswith(("mx", "nv", "vsq")):
        with pytest.raises(PlanError, match="larger than a row"):
            fmt.layout(shape)
        return
    codes, grid = fmt.quantize(weights(*shape))
    save_file(fmt.pack(codes, grid), tmp_path / "weight.safetensors")
    named = load_file(tmp_path / "weight.safetensors")
    found = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in named.items()}
    assert found == {suffix: (what.shape, what.dtype) for suffix, what in fmt.layout(shape).items()}
    again, again_grid = fmt.unpack(named, shape)
    assert torch.equal(again, codes)
    assert again_grid.equals(grid)
    told = fmt.weights_in({suffix: tuple(tensor.shape) for suffix, tensor in named.items()})
    assert told == math.prod(shape) or named["weight_shape"].tolist() == list(shape)
    decoded = fmt.decode(codes, grid)
    assert torch.equal(llmquant_kernels.decode(fmt.packed_weight(named, shape), torch.float32), decoded)
    meta = {
        suffix: torch.empty(what.shape, dtype=what.dtype, device="meta") for suffix, what in fmt.layout(shape).items()
    }
    assert fmt.packed_weight(meta, shape).facts() == fmt.packed_weight(named, shape).facts()


@pytest.mark.parametrize("spec", SPECS)
def test_any_run_of_columns_encodes_and_decodes_as_in_the_whole(spec: str) -> None:
    fmt = settled(spec)
    w = weights(4, 172, seed=1)
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    decoded = fmt.decode(codes, grid)
    for start, stop in [(0, 172), (0, 1), (31, 33), (5, 140), (96, 128), (160, 172), (171, 172)]:
        part = grid.columns(start, stop)
        assert torch.equal(fmt.encode(w[:, start:stop], part), codes[:, start:stop])
        assert torch.equal(fmt.decode(codes[:, start:stop], part), decoded[:, start:stop])


@pytest.mark.parametrize("spec", [*SPECS, "int4:g32:asym_float", "int5:g32:sym_gptq"])
def test_the_lattice_holds_what_codes_stand_for(spec: str) -> None:
    fmt = settled(spec)
    w = weights(6, 75, seed=15)
    grid = fmt.fit(w)
    codes = fmt.encode(w, grid)
    lattice = fmt.lattice(grid)
    assert (lattice.levels.diff(dim=1) >= 0).all()
    if isinstance(fmt.element, Float):  # -0.0 is the same level as 0.0
        codes = fmt.element.codes(fmt.element.levels(codes) + 0.0)
    place = (codes.unsqueeze(-1) == lattice.codes).float().argmax(-1)
    groups = torch.arange(75) // lattice.group

    def of_columns(values: Tensor | None) -> Tensor | float:
        return 0.0 if values is None else values[:, groups]

    levels = lattice.levels.expand(6, -1).gather(1, place)
    value = (levels - of_columns(lattice.zero)) * of_columns(lattice.scale) + of_columns(lattice.offset)
    torch.testing.assert_close(value, fmt.decode(codes, grid), rtol=1e-6, atol=1e-7)
    assert len(lattice.codes) == len(all_codes(fmt)) - isinstance(fmt.element, Float)  # two zeros are one level


@pytest.mark.parametrize("spec", SPECS)
def test_decoded_weights_are_quantized_without_loss(spec: str) -> None:
    """By the plain rule, which finds the grid they lie on, and by the search, which cannot do better than nothing."""
    if spec.endswith(("twn", "absmean")) or ":sym_gptq" in spec:
        pytest.skip("the scale of this rule is not that of the weights it makes")
    fmt = settled(spec)
    codes, grid = fmt.quantize(weights(6, 128, seed=2), clip="minmax")
    if spec.startswith("vsq"):
        codes[:, ::16] = int(fmt.element.largest)  # every vector uses its levels to the end
    planted = fmt.decode(codes, grid)
    for clip in ("minmax", "search"):
        codes, grid = fmt.quantize(planted, clip=clip)
        atol = 2e-3 if "dq" in spec or spec.startswith("kmeans3:g") else 1e-7  # scales that are rounded once more
        torch.testing.assert_close(fmt.decode(codes, grid), planted, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("spec", SPECS)
def test_the_search_never_loses_to_the_plain_rule_and_weights_count(spec: str) -> None:
    fmt = settled(spec)
    w = weights(64, 256, seed=3)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(4)).pow(4) + 1e-3

    def loss(clip: str, h: Tensor | None) -> float:
        codes, grid = fmt.quantize(w, h, clip=clip)
        return float(((fmt.decode(codes, grid) - w).double().square() * importance).sum())

    slack = 1.02 if "dq" in spec else 1 + 1e-6
    assert loss("search", importance) <= loss("search", None) * slack
    if not spec.endswith("rceil"):  # a rule of its own, for which the plain one is another
        assert loss("search", importance) <= loss("minmax", None) * slack


@pytest.mark.parametrize("spec", SPECS)
def test_results_do_not_depend_on_the_number_of_threads(spec: str) -> None:
    w = weights(300, 1024, seed=5)
    fmt = settled(spec)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        codes, grid = fmt.quantize(w)
        torch.set_num_threads(3)
        again, again_grid = fmt.quantize(w)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes, again)
    assert grid.equals(again_grid)


# ---- any weight at all

magnitudes = st.sampled_from([0.0, 1e-45, 1e-40, 1e-38, 1e-10, 1e-3, 1.0, 300.0, 6e4, 1e20, 1e37])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 15, 16, 33, 64, 70]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(rows, columns, generator=generator) * draw(magnitudes)
    w = torch.where(torch.rand(rows, columns, generator=generator) < 0.1, draw(magnitudes), w)
    w = torch.where(torch.rand(rows, columns, generator=generator) < 0.1, -0.0, w)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return w.clamp(-6e4, 6e4).to(dtype).float() if dtype == torch.float16 else w.to(dtype).float()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if ":g" not in spec] + ["int4:g1", "nf4:g1", "ternary:g1"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(w=matrices(), clip=st.sampled_from(["search", "minmax"]), weighted=st.booleans())
def test_whatever_the_weight(spec: str, w: Tensor, clip: str, weighted: bool) -> None:
    """Nothing but numbers is stored, every code is of the nearest level, and encoding again changes nothing."""
    fmt = settled(spec)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(0)) if weighted else None
    try:
        grid = fmt.fit(w, importance, clip=clip)
    except ScaleOverflow:
        assert w.abs().max() > 1e4
        return
    codes = fmt.encode(w, grid)
    decoded = fmt.decode(codes, grid)
    assert torch.isfinite(decoded).all()
    assert all(torch.isfinite(t.float()).all() for t in fmt.pack(codes, grid).values())
    assert torch.equal(fmt.decode(fmt.encode(decoded, grid), grid), decoded)
    error = (decoded.double() - w.double()).abs()
    for code in all_codes(fmt)[:: max(1, 2**fmt.element.bits // 32)]:
        other = fmt.decode(torch.full_like(codes, code), grid).double()
        assert (error <= (other - w.double()).abs() * (1 + 1e-5) + 1e-44).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_index(spec: str, bad: float) -> None:
    w = weights(4, 64)
    w[2, 5] = bad
    with pytest.raises(NonFiniteInput, match=r"at \[2, 5\]"):
        settled(spec).fit(w)


@pytest.mark.parametrize("spec", SPECS)
def test_unknown_clip_modes_are_refused(spec: str) -> None:
    with pytest.raises(PlanError, match="clip mode 'nonsense' is unknown"):
        settled(spec).fit(weights(2, 64), clip="nonsense")


# ---- best possible fits


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_k_means_finds_the_best_of_all_partitions(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, generator=generator).double()
    h = torch.rand(9, generator=generator).double()
    ordered, order = x.sort()
    weight = h[order]
    best = math.inf
    for cuts in itertools.combinations(range(1, 9), k - 1):
        runs = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, 9))]
        means = [(ordered[run] * weight[run]).sum() / weight[run].sum() for run in runs]
        best = min(
            best, sum(float((weight[r] * (ordered[r] - m) ** 2).sum()) for r, m in zip(runs, means, strict=True))
        )
    levels = clustering.levels(x.float().view(1, -1), h.float().view(1, -1), k)[0].double()
    found = (h * (x[:, None] - levels).abs().amin(1).square()).sum()
    assert float(found) == pytest.approx(best, rel=1e-5)


def test_k_means_of_long_rows_is_nearly_as_good_as_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    x = weights(2, 1500, seed=7)
    found = clustering.levels(x, None, 8)
    loss = (x[:, :, None] - found[:, None, :]).abs().amin(2).double().square().sum()
    monkeypatch.setattr(clustering, "EXACT", 1500)
    best = clustering.levels(x, None, 8)
    exact = (x[:, :, None] - best[:, None, :]).abs().amin(2).double().square().sum()
    assert exact <= loss <= 1.01 * exact


@pytest.mark.parametrize("weighted", [False, True])
def test_ternary_is_the_best_of_all_choices(weighted: bool) -> None:
    fmt = settled("ternary:g8:fp32")
    w = weights(1, 8, seed=8)
    h = torch.rand(8, generator=torch.Generator().manual_seed(9)) if weighted else torch.ones(8)
    best = math.inf
    for kept in itertools.product([-1.0, 0.0, 1.0], repeat=8):
        q = torch.tensor(kept)
        scale = (h * q * w[0]).sum() / (h * q * q).sum() if q.any() else torch.tensor(0.0)
        best = min(best, float((h * (w[0] - q * scale).square()).sum()))
    codes, grid = fmt.quantize(w, h)
    assert float((h * (fmt.decode(codes, grid) - w).square()).sum()) == pytest.approx(best, rel=1e-5)


def test_binary_scale_is_the_best_for_signs() -> None:
    fmt = settled("binary:g8:fp32")
    w = weights(1, 8, seed=10)
    h = torch.rand(8, generator=torch.Generator().manual_seed(11))
    codes, grid = fmt.quantize(w, h)
    assert codes.tolist() == [[1 if v >= 0 else -1 for v in w[0].tolist()]]
    assert grid.scale.item() == pytest.approx(float((h * w[0].abs()).sum() / h.sum()), rel=1e-6)


def test_double_quantization_has_the_levels_of_the_dynamic_map() -> None:
    from llmquant.formats.table import dynamic_map

    levels = dynamic_map().values
    assert len(levels) == 256
    assert (levels[-1], levels.count(0.0)) == (1.0, 1)
    assert levels[0] == pytest.approx(-0.99296875)
    assert min(level for level in levels if level > 0) == pytest.approx(5.5e-7)


def test_tensors_may_share_the_scale_of_nvfp4() -> None:
    fmt = NVFP4()
    a, b = weights(8, 64, seed=12), 3 * weights(8, 64, seed=13)
    shared = float(torch.maximum(a.abs().max(), b.abs().max())) / 2688
    grids = [fmt.fit(w, tensor_scale=shared) for w in (a, b)]
    assert torch.equal(*(fmt.pack(fmt.encode(a, grid), grid)["weight_global_scale"] for grid in grids))


# ---- the size of the file


@pytest.mark.parametrize(
    ("spec", "shape", "bits"),
    [
        *((f"mxfp{b}_{e}", (64, 4096), b + 0.25) for b, e in [(8, "e4m3"), (8, "e5m2"), (6, "e3m2"), (6, "e2m3")]),
        ("mxfp4", (64, 4096), 4.25),
        ("mxint8", (64, 4096), 8.25),
        ("nvfp4", (64, 4096), 4.5 + 32 / (64 * 4096)),
        *((f"mx{b}", (64, 4096), b) for b in (9, 6, 4)),
        *((f"mx{b}", (3, 48), b) for b in (9, 6, 4)),
        *((f"vsq{n}:s{m}", (64, 4096), n + m / 16 + 16 / 4096) for n in range(3, 9) for m in (4, 5, 6)),
        ("fp8_e4m3:channel", (64, 4096), 8 + 32 / 4096),
        ("fp8_e5m2:tensor", (64, 4096), 8 + 32 / (64 * 4096)),
        ("fp8_e4m3:block", (256, 4096), 8 + 32 / 16384),
        ("nf4:g64", (64, 4096), 4.25),
        ("nf4:g64:fp32", (64, 4096), 4.5),
        ("nf4:g64:dq", (64, 4096), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (64 * 4096)),
        ("table:-1,0,1:g32", (64, 4096), 2.5),
        ("kmeans4:channel", (64, 4096), 4 + 16 * 16 / 4096),
        ("kmeans4:g64", (64, 4096), 4 + 16 / 64 + 16 * 16 / (64 * 4096)),
        ("ternary:g128", (64, 5120), 1.6 + 16 / 128),
        ("binary:g128", (64, 4096), 1.125),
        *((f"int{b}:g128", (64, 4096), b + 16 / 128 + 128 / (64 * 4096)) for b in range(2, 9)),
        ("int4:g128:asym", (64, 4096), 4 + 20 / 128 + 128 / (64 * 4096)),
    ],
)
def test_bits_per_weight_are_those_of_the_file(spec: str, shape: tuple[int, int], bits: float, tmp_path: Path) -> None:
    """The formula, and the bytes between the header and the end of a file."""
    fmt = settled(spec)
    assert fmt.bits_per_weight(shape) == pytest.approx(bits, rel=1e-9)
    save_file(fmt.pack(*fmt.quantize(weights(*shape), clip="minmax")), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    assert 8 * (len(data) - 8 - int.from_bytes(data[:8], "little")) / math.prod(shape) == pytest.approx(bits, rel=1e-9)


# ---- what others read


def theirs(fmt: Scalar, arguments: dict[str, Any], compressor: str) -> Tensor:
    """The weight as compressed-tensors decodes the file's tensors."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    base = pytest.importorskip("compressed_tensors.compressors.base")
    common = {"symmetric": True, "dynamic": False, **arguments}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**common))
    w = weights(256, 256, seed=14)
    named = fmt.pack(*fmt.quantize(w))
    return base.BaseCompressor.get_value_from_registry(compressor).decompress(dict(named), scheme)["weight"]


@pytest.mark.parametrize(
    ("spec", "compressor", "arguments"),
    [
        ("mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, "group_size": 32, "scale_dtype": torch.uint8}),
        ("mxfp6_e2m3", "mxfp6-pack-quantized", {"num_bits": 6, "group_size": 32, "scale_dtype": torch.uint8}),
        ("mxfp8_e4m3", "mxfp8-quantized", {"num_bits": 8, "group_size": 32, "scale_dtype": torch.uint8}),
        ("nvfp4", "nvfp4-pack-quantized", {"num_bits": 4, "group_size": 16, "strategy": "tensor_group"}),
        ("fp8_e4m3:channel", "float-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("fp8_e4m3:tensor", "float-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("fp8_e4m3:block", "float-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}),
    ],
)
def test_floats_are_the_bytes_of_compressed_tensors(spec: str, compressor: str, arguments: dict[str, Any]) -> None:
    fmt = settled(spec)
    assert fmt.compressed_tensors == compressor
    found = theirs(fmt, {"type": "float", **arguments}, compressor)
    codes, grid = fmt.quantize(weights(256, 256, seed=14))
    ours = fmt.decode(codes, grid)
    # Theirs multiplies in bfloat16 where its scales are of 8 bits.
    tolerance = 0.0 if spec.startswith("fp8") else 2.0**-8
    torch.testing.assert_close(found.float(), ours, rtol=tolerance, atol=0)


# ---- names


@pytest.mark.parametrize("spec", SPECS)
def test_specs_name_their_format(spec: str) -> None:
    fmt = formats.get(spec)
    assert formats.get(fmt.spec) == fmt
    stored = fmt.stored_for(torch.bfloat16)
    assert formats.get(stored.spec) == stored


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "mxfp5",
            "mxfp4:nearest",
            "mxfp4:g16",
            "nvfp4:g32",
            "mx5",
            "mx6:floor",
            "vsq2",
            "vsq9",
            "vsq4:s3",
            "vsq4:g32",
        ),
        *(
            "fp8_e3m4",
            "fp8_e4m3:rows",
            "nf4:dq:fp16",
            "nf4:g0",
            "table",
            "table:1,0",
            "table:0,x",
            "table:0",
            "table:0,inf",
        ),
        *("kmeans9", "kmeans0", "kmeans4:search", "ternary:best", "binary:twn", "binary:g0"),
    ],
)
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(PlanError):
        formats.get(spec)


# ---- bytes that must never change


def golden_example(spec: str) -> dict[str, str]:
    """Suffix -> bytes, in hexadecimal, of a simple weight (3, 50) by the plain rule."""
    ramp = (torch.arange(150).view(3, 50) * 37 % 101 - 50) / 64
    named = settled(spec).pack(*settled(spec).quantize(ramp, clip="minmax"))
    return {suffix: bytes(t.reshape(-1).clone().view(torch.uint8).tolist()).hex() for suffix, t in named.items()}


@pytest.mark.parametrize("spec", json.loads(GOLDEN.read_text()) if GOLDEN.exists() else [])
def test_files_written_by_earlier_versions_stay_readable(spec: str) -> None:
    """The bytes stored here are what this version writes, and they decode to what they did."""
    expected = json.loads(GOLDEN.read_text())[spec]
    assert golden_example(spec) == expected["bytes"]
    layout = settled(spec).layout((3, 50))
    named = {
        suffix: torch.frombuffer(bytearray.fromhex(text), dtype=layout[suffix].dtype).view(layout[suffix].shape)
        for suffix, text in expected["bytes"].items()
    }
    decoded = settled(spec).decode(*settled(spec).unpack(named, (3, 50)))
    assert decoded.double().sum().item() == pytest.approx(expected["sum"], rel=1e-6)
    assert decoded.double().square().sum().item() == pytest.approx(expected["energy"], rel=1e-6)


def test_every_family_has_bytes_that_must_not_change() -> None:
    stored = json.loads(GOLDEN.read_text())
    for pattern in formats.FAMILIES:
        if not pattern.startswith("int"):  # test_formats.py has those
            assert any(re.fullmatch(pattern, spec.split(":")[0]) for spec in stored), pattern
