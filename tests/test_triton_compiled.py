"""The Triton kernels compiled for GPUs that are not there: their assembly executed, their machine code read."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton, not interpreted"
)


# ---- the assembly, by a simulator of the six instructions that it consists of


def value_of(bits: np.ndarray, f16: bool) -> np.ndarray:
    """16-bit floats as float64."""
    halves = torch.from_numpy(bits.astype(np.uint16).view(np.int16))
    return halves.view(torch.float16 if f16 else torch.bfloat16).double().numpy()


def simulate(text: str, registers: dict[str, np.ndarray], f16: bool) -> tuple[np.ndarray, np.ndarray]:
    """The low and high half of $0, float64: products and sums are exact there."""
    halves: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def bits_of(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.asarray(int(name, 0))

    def halves_of(name: str) -> tuple[np.ndarray, np.ndarray]:
        if name in halves:
            return halves[name]
        bits = bits_of(name)
        return value_of(np.atleast_1d(bits & 0xFFFF), f16), value_of(np.atleast_1d(bits >> 16), f16)

    body = re.sub(r"^\{\.reg [^;]*;|\}$", "", text)
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        op, rest = statement.split(" ", 1)
        to, *sources = [part.strip() for part in rest.split(",")]
        if op.startswith("fma.rn"):
            a, b, c = map(halves_of, sources)
            halves[to] = (a[0] * b[0] + c[0], a[1] * b[1] + c[1])
            continue
        halves.pop(to, None)
        if op == "mov.b32" and sources[0] in halves:
            halves[to] = halves[sources[0]]
        elif op == "mov.b32":
            registers[to] = bits_of(sources[0])
        elif op == "shr.b32":
            registers[to] = bits_of(sources[0]) >> int(sources[1])
        elif op == "shl.b32":
            registers[to] = (bits_of(sources[0]) << int(sources[1])) & 0xFFFFFFFF
        elif op == "and.b32":
            registers[to] = bits_of(sources[0]) & bits_of(sources[1])
        else:
            assert (op, sources[3]) == ("lop3.b32", "0xea")  # (a & b) | c
            registers[to] = bits_of(sources[0]) & bits_of(sources[1]) | bits_of(sources[2])
    return halves_of("$0")


def stands_for(numbers: str) -> np.ndarray:
    """What every code is, float64."""
    if numbers.startswith("int"):
        return np.arange(2.0 ** int(numbers[3:]))
    if numbers == "mag8":
        return np.concatenate([np.arange(256.0), -np.arange(256.0)])
    exponent, mantissa = int(numbers[1]), int(numbers[3])
    code = np.arange(2 ** (exponent + mantissa))
    e, m = code >> mantissa, code & 2**mantissa - 1
    bias = 2 ** (exponent - 1) - 1
    size = np.where(e == 0, np.ldexp(m, 1 - bias - mantissa), np.ldexp(2**mantissa + m, e - bias - mantissa))
    return np.concatenate([size, -size])


NUMBERS = [*(f"int{bits}" for bits in range(1, 9)), "e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "mag8"]


@pytest.mark.parametrize("f16", [False, True])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_assembly_decodes_every_code_exactly(numbers: str, f16: bool) -> None:
    """Of every part, beside a neighbour in the other half of the register and with noise in the bits of other parts."""
    from llmquant_kernels.triton_decode import assembly
    from llmquant_kernels.triton_layout import high_bits, low_bits, place_of, unit_of

    values = stands_for(numbers)
    bits = int(np.log2(len(values)))
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.resize(np.arange(2**bits), 4096))
    beside = rng.permutation(codes)
    unit = unit_of(numbers, torch.float16 if f16 else torch.bfloat16)
    zero = -(2.0 ** (bits - 1)) * unit if numbers.startswith("int") else 0.0
    packed_zero = torch.tensor([zero], dtype=torch.float16 if f16 else torch.bfloat16).view(torch.int16).numpy()
    if numbers == "e5m2" and f16:
        values = np.where(np.isin(np.arange(256) & 0x7F, range(0x7C, 0x80)), np.nan, values)  # no numbers there
    for part in range(8):
        words = rng.integers(0, 2**16, (2, 2, len(codes)))  # [low or high word, half]
        for half, own in enumerate((codes, beside)):
            for bit in range(bits):
                place = place_of(numbers, low_bits(bits), high_bits(bits), part, bit)
                word = words[place // 16, half]
                word[:] = word & ~(1 << place % 16) | (own >> bit & 1) << place % 16
        registers = {"$1": words[0, 1] << 16 | words[0, 0], "$2": words[1, 1] << 16 | words[1, 0]}
        registers["$3"] = np.full(len(codes), int(packed_zero.view(np.uint16)[0]) * 0x10001)
        results = simulate(assembly(numbers, part, f16, False), registers, f16)
        for found, own in zip(results, (codes, beside), strict=True):
            exact = values[own] * unit + zero
            finite = np.isfinite(exact)
            assert np.array_equal(found[finite], exact[finite]), part
            rounded = torch.from_numpy(exact[finite]).to(torch.float16 if f16 else torch.bfloat16).double().numpy()
            assert np.array_equal(rounded, exact[finite])  # the type holds it: nothing is lost


def run(text: str, registers: dict[str, np.ndarray]) -> None:
    """Integer instructions on registers of 32 bits, among the 32 lanes of a warp: (lanes,) int64 each."""

    def value(name: str) -> np.ndarray:
        return registers[name] if name in registers else np.full(32, int(name, 0), dtype=np.int64)

    body = re.sub(r"^\{\.reg [^;]*;|\}$", "", text)
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        op, rest = statement.split(" ", 1)
        to, *names = [part.strip() for part in rest.split(",")]
        sources = [value(name) for name in names]
        if op == "mov.b32":
            found = sources[0]
        elif op in ("shr.b32", "shr.u32"):
            found = sources[0] >> sources[1]
        elif op == "shl.b32":
            found = sources[0] << sources[1]
        elif op in ("and.b32", "or.b32"):
            found = sources[0] & sources[1] if op == "and.b32" else sources[0] | sources[1]
        elif op == "lop3.b32":  # the bit of the table that the bits of a, b and c count up to
            found = np.zeros(32, dtype=np.int64)
            for bit in range(32):
                a, b, c = (source >> bit & 1 for source in sources[:3])
                found |= (sources[3] >> (4 * a + 2 * b + c) & 1) << bit
        elif op == "prmt.b32":
            pool = sources[0] | sources[1] << 32
            found = np.zeros(32, dtype=np.int64)
            for i in range(4):
                nibble = sources[2] >> (4 * i) & 15
                assert not (nibble & 8).any(), "takes the sign instead of the byte"
                found |= (pool >> (8 * nibble) & 0xFF) << (8 * i)
        else:
            assert op == "shfl.sync.idx.b32", op
            lane, segment = np.arange(32), sources[2] >> 8 & 31
            found = sources[0][lane & segment | sources[1] & 31 & ~segment]
        registers[to] = found & 0xFFFFFFFF


def words_of(codes: np.ndarray, numbers: str, part: int, noise: np.ndarray) -> np.ndarray:
    """Low and high words (2, codes) of which `part` holds the codes."""
    from llmquant_kernels.triton_layout import bits_of_numbers, high_bits, low_bits, place_of

    bits = bits_of_numbers(numbers)
    words = noise.copy()
    for bit in range(bits):
        place = place_of(numbers, low_bits(bits), high_bits(bits), part, bit)
        word = words[place // 16]
        word[:] = word & ~(1 << place % 16) | (codes >> bit & 1) << place % 16
    return words


@pytest.mark.parametrize("numbers", ["tab1", "tab2", "tab3", "tab4", "tab5"])
def test_lanes_look_up_the_entries_that_others_hold(numbers: str) -> None:
    from llmquant_kernels.triton_decode import lane_lookup

    bits, rng = int(numbers[3]), np.random.default_rng(0)
    table = rng.integers(0, 2**32, 2**bits)
    for part in range(8):
        codes = rng.integers(0, 2**bits, (2, 32))
        noise = rng.integers(0, 2**16, (2, 2, 32))  # [word of the pair, low or high]
        pair = [words_of(codes[half], numbers, part, noise[half]) for half in range(2)]
        registers = {"$2": pair[1][0] << 16 | pair[0][0], "$3": pair[1][1] << 16 | pair[0][1]}
        registers["$4"] = table[np.arange(32) % 2**bits]
        run(lane_lookup(numbers, part), registers)
        assert np.array_equal(registers["$0"], table[codes[0]]), part
        assert np.array_equal(registers["$1"], table[codes[1]]), part


@pytest.mark.parametrize("numbers", ["row2", "row3", "row4"])
def test_bytes_of_a_rows_table_are_chosen_by_its_codes(numbers: str) -> None:
    """The table as the layout packs it."""
    from llmquant_kernels.triton_decode import row_lookup
    from llmquant_kernels.triton_layout import table_bytes

    bits, rng = int(numbers[3]), np.random.default_rng(0)
    table = torch.randn(32, 2**bits, generator=torch.Generator().manual_seed(0)).bfloat16()
    halves = table.view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    packed = table_bytes(table).numpy().astype(np.int64) & 0xFFFFFFFF
    for odd in range(1 if bits == 4 else 2):
        parts = range(4) if bits == 4 else range(odd, 8, 2)
        codes = rng.integers(0, 2**bits, (4, 2, 32))
        pair = [rng.integers(0, 2**16, (2, 32)) for _ in range(2)]
        for half in range(2):
            for i, part in enumerate(parts):
                pair[half] = words_of(codes[i, half], numbers, part, pair[half])
        high = [word[1] & 0xFF for word in pair]  # words of one bit have eight
        registers = {"$4": pair[1][0] << 16 | pair[0][0], "$5": high[1] << 16 | high[0]}
        registers |= {f"${6 + 2 * j + k}": packed[:, j] for j in range(8) for k in range(2)}
        run(row_lookup(numbers, odd), registers)
        for i in range(4):
            lower, upper = halves[np.arange(32), codes[i, 0]], halves[np.arange(32), codes[i, 1]]
            assert np.array_equal(registers[f"${i}"], upper << 16 | lower), (odd, i)


def test_places_of_bits_are_each_used_once() -> None:
    from llmquant_kernels.triton_layout import bits_of_numbers, high_bits, low_bits, place_of

    for numbers in (*NUMBERS, "tab4"):
        bits = bits_of_numbers(numbers)
        low, high = low_bits(bits), high_bits(bits)
        parts = 8 if low == 1 else 16 // low
        places = [place_of(numbers, low, high, part, bit) for part in range(parts) for bit in range(low)]
        assert sorted(places) == list(range(8 if low == 1 else 16))
        places = [place_of(numbers, low, high, part, bit) for part in range(8) for bit in range(low, bits)]
        assert sorted(places) == list(range(16, 16 + 8 * high))


# ---- machine code

# Format, rows of x, and the most instructions per weight in the loop, of sm_80, sm_90 and sm_100. The counts are what
# triton 3.6 and 3.9 give, and a tenth.
BUDGETS: list[tuple[str, int, tuple[float, float, float]]] = [
    ("int4", 1, (2.4, 2.4, 2.4)),
    ("int4", 32, (4.0, 2.6, 3.0)),
    ("int3", 1, (3.9, 3.9, 3.9)),
    ("int8", 1, (2.5, 2.5, 2.5)),
    ("mxfp4", 1, (3.6, 3.6, 3.6)),
    ("nvfp4", 1, (5.2, 5.2, 5.2)),
    ("nf4", 1, (5.6, 5.6, 5.6)),
    ("kmeans4 row", 1, (3.8, 3.8, 3.8)),
    ("kmeans3 row", 1, (3.9, 3.9, 3.9)),
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Nothing that was compiled before counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "rows", "budgets"), BUDGETS)
def test_loops_fit_their_budget(name: str, rows: int, budgets: tuple[float, ...], capability: int) -> None:
    import count
    from llmquant_kernels.triton_settings import settings_for, shared_bytes

    spec, device = count.FORMATS[name], count.device(capability)
    settings = settings_for(rows, spec, device)
    found = count.count(settings.kernel, spec, settings, capability)
    assert found.stack == 0, "registers are spilled"
    assert found.shared <= min(device.shared, 1.1 * shared_bytes(settings, spec))
    units = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "HMMA")}[capability]
    assert found.number(*(("HMMA",) if settings.kernel == "gemv" else units))
    budget = budgets[{80: 0, 90: 1, 100: 2}[capability]]
    assert found.per_weight <= budget, f"{found.per_weight:.2f} instructions to a weight"
    # Codes are loaded 16 bytes at a time, into shared memory, ahead of their use.
    wide = int(found.loads("LDGSTS").split("/")[0])
    assert wide * 16 * 32 >= found.weights * spec.bits / 8
    assert found.loads("LDG") == "0/0/0"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_other_kernels_compile(capability: int) -> None:
    import count
    from llmquant_kernels.triton_settings import Settings

    for name, f16 in (("int3", False), ("mxfp4", True)):
        found = count.count("dequantize", count.FORMATS[name], Settings("dequantize", warps=1), capability, f16)
        assert found.stack == 0
