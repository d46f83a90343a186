"""How the kernels decode: words of codes to 16-bit floats, words of scales to float32.

A word's parts become the bits of a 16-bit float by masks and shifts alone, then one fused multiply-add gives the value.
Bits 7 to 0 of a bfloat16 (10 to 0 of a float16) are linear, because the subnormals and the first binade share one unit
in the last place: an integer there is that multiple of 2**-133 (2**-24), and a product with a power of two is exact.
Signs, exponents and mantissas of small floats are put where the wide one has its own; the biases differ by a power of
two. On a GPU this is inline assembly, two weights to an instruction; the plain twin does the same for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import triton_layout

# Functions that run while a kernel is compiled are part of what its cache goes by: triton must know all of them.
bits_of_numbers = triton.constexpr_function(triton_layout.bits_of_numbers)
low_bits = triton.constexpr_function(triton_layout.low_bits)
high_bits = triton.constexpr_function(triton_layout.high_bits)
place_of = triton.constexpr_function(triton_layout.place_of)


# A move, (high, shift, mask), is ``value |= (word >> shift) & mask``, of the high part's word or the low's; a negative
# shift is one to the left. Functions of the compiler have no types, named fields or pairs as targets of loops: triton
# 3.6 reads none of them.


@triton.constexpr_function
def moves_of(numbers, part, bits, to):
    """The moves of code bits `bits`, a range, to bit `to` and up: those of the same word by the same shift in one."""
    low = low_bits(bits_of_numbers(numbers))
    high = high_bits(bits_of_numbers(numbers))
    found = []
    for bit in bits:
        place = place_of(numbers, low, high, part, bit)
        shift = place % 16 - (to + bit - bits[0])
        same = [i for i in range(len(found)) if found[i][:2] == (place >= 16, shift)]
        mask = 1 << (to + bit - bits[0])
        if same:
            mask += found.pop(same[0])[2]
        found.append((place >= 16, shift, mask))
    return found


@triton.constexpr_function
def recipe(numbers, part, f16):
    """How part number `part` of eight (of 256 columns) becomes a float16 or bfloat16 in the unit of `unit_of`.

    Moves, and the exponent of the power of two to multiply by; None: the bits are the value.
    """
    bits = bits_of_numbers(numbers)
    window = 11 if f16 else 8
    middle = 14 if f16 else 127
    if numbers.startswith("int"):
        # Anywhere in the linear bits: where most parts already are.
        best = []
        for to in range(window - bits + 1):
            made = moves_of(numbers, part, range(bits), to)
            best.append((sum(move[1] != 0 for move in made), to, made))
        best = min(best)
        return best[2], middle - best[1]
    fraction = (10 if f16 else 7) - int(numbers[3]) if numbers[0] == "e" else 0
    made = moves_of(numbers, part, range(bits - 1), fraction)
    sign = moves_of(numbers, part, range(bits - 1, bits), 15)[0]
    same = [i for i in range(len(made)) if made[i][:2] == sign[:2]]
    if same:
        sign = (sign[0], sign[1], sign[2] + made.pop(same[0])[2])
    made.append(sign)
    if numbers.startswith("mag"):
        return made, middle
    bias = 2 ** (int(numbers[1]) - 1) - 1
    return made, None if f16 else 127 - bias


@triton.constexpr_function
def parts_of(bits):
    """Parts in a word."""
    return 8 if bits == 1 else 16 // bits


@triton.constexpr_function
def assembly(numbers, part, f16, scaled):
    """PTX for two weights: $0 from the words $1 and $2 (high part), $3 is added; then multiplied by the scale $4."""
    made = recipe(numbers, part, f16)
    moves = made[0]
    kind = "f16x2" if f16 else "bf16x2"
    lines = []
    for i in range(len(moves)):
        move = moves[i]
        word = "$2" if move[0] else "$1"
        if move[1]:
            lines.append(f"{'shr' if move[1] > 0 else 'shl'}.b32 u, {word}, {abs(move[1])};")
            word = "u"
        mask = f"{move[2] << 16 | move[2]:#x}"
        lines.append(f"lop3.b32 t, {word}, {mask}, t, 0xea;" if i else f"and.b32 t, {word}, {mask};")
    if made[1] is not None:
        power = (made[1] + 15) << 10 if f16 else (made[1] + 127) << 7
        lines += [f"mov.b32 u, {power << 16 | power:#x};", f"fma.rn.{kind} t, t, u, $3;"]
    if scaled:  # -0 added: mul.bf16x2 needs sm_90
        lines += ["mov.b32 u, 0x80008000;", f"fma.rn.{kind} t, t, $4, u;"]
    return "{.reg .b32 t, u; " + " ".join(lines) + " mov.b32 $0, t;}"


@triton.constexpr_function
def power_of_2(n):
    """The least that is no less."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def is_table(numbers):
    return numbers[:3] in ("tab", "own", "row")


@triton.constexpr_function
def is_row_table(numbers):
    return numbers[:3] == "row"


@triton.constexpr_function
def is_lane_table(numbers):
    return numbers[:3] == "tab"


@triton.constexpr_function
def is_integer(numbers):
    return numbers.startswith("int")


@triton.constexpr_function
def unit(numbers, f16):
    return 1.0 if numbers[0] in "etor" else 2.0**-10 if f16 else 2.0**-6


@triton.constexpr_function
def _moves(numbers, part, f16):
    return len(recipe(numbers, part, f16)[0])


@triton.constexpr_function
def _move(numbers, part, f16, i, field):
    return int(recipe(numbers, part, f16)[0][i][field])


@triton.constexpr_function
def _power(numbers, part, f16):
    exponent = recipe(numbers, part, f16)[1]
    return 1.0 if exponent is None else 2.0**exponent


@triton.jit
def moved(low, high, HIGH: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """One Move."""
    word = low
    if HIGH:
        word = high
    if SHIFT >= 0:
        return (word >> SHIFT) & MASK
    else:
        return (word << -SHIFT) & MASK


@triton.jit
def taken(low, high, NUMBERS: tl.constexpr, PART: tl.constexpr, F16: tl.constexpr):
    """The plain twin of the masks and shifts, int32. low, high: words, int32."""
    value = low * 0
    for i in tl.static_range(_moves(NUMBERS, PART, F16)):
        value |= moved(
            low, high, _move(NUMBERS, PART, F16, i, 0), _move(NUMBERS, PART, F16, i, 1), _move(NUMBERS, PART, F16, i, 2)
        )
    return value


@triton.jit
def code(low, high, NUMBERS: tl.constexpr, PART: tl.constexpr):
    """Part PART of words, as an unsigned int32."""
    LOW: tl.constexpr = low_bits(bits_of_numbers(NUMBERS))
    value = (low.to(tl.int32) >> (LOW * (PART % parts_of(LOW)))) & ((1 << LOW) - 1)
    if high_bits(bits_of_numbers(NUMBERS)):
        HIGH: tl.constexpr = high_bits(bits_of_numbers(NUMBERS))
        value |= ((high.to(tl.int32) >> (HIGH * PART)) & ((1 << HIGH) - 1)) << LOW
    return value


@triton.jit
def decoded(low, high, zero, NUMBERS: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr, DT: tl.constexpr):
    """Part PART of the words as DT: (number - zero) in the unit of `unit_of`, exactly. zero: -zero in that unit, DT."""
    F16: tl.constexpr = DT == tl.float16
    if ASM:
        source: tl.constexpr = assembly(NUMBERS, PART, F16, False)
        words = [low.to(tl.int16), high.to(tl.int16), zero]
        return tl.inline_asm_elementwise(source, "=r,r,r,r", words, dtype=zero.dtype, is_pure=True, pack=2)
    bits = taken(low.to(tl.int32), high.to(tl.int32), NUMBERS, PART, F16)
    if F16:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = (bits << 16).to(tl.float32, bitcast=True)
    value = value * _power(NUMBERS, PART, F16)
    if is_integer(NUMBERS):
        value += zero.to(tl.float32)
    return value.to(DT)


@triton.jit
def decoded_scaled(
    low, high, zero, scale, NUMBERS: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr, DT: tl.constexpr
):
    """The same times scale, DT, rounded once."""
    F16: tl.constexpr = DT == tl.float16
    if ASM:
        source: tl.constexpr = assembly(NUMBERS, PART, F16, True)
        words = [low.to(tl.int16), high.to(tl.int16), zero, scale]
        return tl.inline_asm_elementwise(source, "=r,r,r,r,r", words, dtype=zero.dtype, is_pure=True, pack=2)
    value = decoded(low, high, zero, NUMBERS, PART, False, DT)
    return (value.to(tl.float32) * scale.to(tl.float32)).to(DT)


@triton.constexpr_function
def parts_per_unit(units):
    """Parts of 32 columns that share a scale."""
    return max(1, 8 // units) if units else 8


@triton.constexpr_function
def unit_at(part, units, half):
    """The scale, of `units` in 256 columns, of half of 16 columns `half` of part `part`."""
    return part * units // 8 + half


@triton.constexpr_function
def scale_bytes(kind):
    """Of an entry of scales."""
    return {"fp32": 4, "fp16": 2, "bf16": 2}.get(kind, 1)


@triton.jit
def next_word(word, pointer, mask, UNIT: tl.constexpr, BYTES: tl.constexpr, MASKED: tl.constexpr):
    """The int32 that holds entry UNIT, of BYTES bytes: loaded where a word begins, else the one at hand.

    pointer: to the first word of each row; words of a row are 16 apart.
    """
    if UNIT * BYTES % 4 == 0:
        if MASKED:
            word = tl.load(pointer + UNIT * BYTES // 4 * 16, mask=mask, other=0)
        else:
            word = tl.load(pointer + UNIT * BYTES // 4 * 16)
    return word


@triton.jit
def entry(word, UNIT: tl.constexpr, KIND: tl.constexpr):
    """Entry UNIT of its word, float32."""
    SHIFT: tl.constexpr = UNIT * scale_bytes(KIND) % 4 * 8
    if KIND == "fp32":
        return word.to(tl.float32, bitcast=True)
    elif KIND == "bf16":
        if SHIFT == 0:
            return (word << 16).to(tl.float32, bitcast=True)
        else:
            return (word & -65536).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        return ((word >> SHIFT) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    byte = (word >> SHIFT) & 0xFF
    if KIND == "e8m0":
        return (byte << 23).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120: biases differ
    else:
        return byte.to(tl.float32)


# ---- tables


@triton.constexpr_function
def lane_entry(bits):
    """PTX: $0 becomes the entry of the table at $1 that has the number of the lane."""
    return (
        "{.reg .b32 l; .reg .b64 a; mov.u32 l, %laneid; "
        f"and.b32 l, l, {2**bits - 1}; mad.wide.u32 a, l, 4, $1; ld.global.nc.b32 $0, [a];}}"
    )


@triton.constexpr_function
def lane_lookup(numbers, part):
    """PTX for two weights: $0 and $1 are the entries that lanes hold in $4 of the codes in words $2, $3 (high part).

    A shuffle takes the lowest bits of a lane's number only, so what lies above a code needs no mask.
    """
    bits = bits_of_numbers(numbers)
    low = low_bits(bits)
    segment = (32 - (1 << bits)) << 8 | 0x1F
    lines = []
    for half in range(2):
        shift = low * (part % parts_of(low)) + 16 * half
        lines.append(f"shr.b32 t, $2, {shift};")
        if high_bits(bits):
            up = high_bits(bits) * part + 16 * half - low
            lines.append(f"{'shr' if up >= 0 else 'shl'}.b32 u, $3, {abs(up)};")
            mask = (1 << low) - 1
            lines.append(f"lop3.b32 t, t, u, {mask:#x}, 0xe4;")  # (t & mask) | (u & ~mask)
        lines.append(f"shfl.sync.idx.b32 ${half}, $4, t, {segment:#x}, 0xffffffff;")
    return "{.reg .b32 t, u; " + " ".join(lines) + "}"


@triton.constexpr_function
def row_lookup(numbers, odd):
    """PTX for four parts of two words: $0 to $3 are two 16-bit floats each, of the words $4, $5 (high part).

    The bytes of the row's table are in $6 (and $7, the same again for the other word), $8, ... The codes of 16 bits
    choose four of the lower and four of the upper bytes at a time; a table of 16 takes two choices and one between
    them. Parts: all four of a word of 4 bits; else the even or the odd ones of a word's eight.
    """
    bits = bits_of_numbers(numbers)
    lines = []
    if bits == 4:
        lines.append("mov.b32 n, $4;")
    else:
        lines += [f"shr.b32 n, $4, {2 * odd};", "and.b32 n, n, 0x33333333;"]
    if bits == 3:  # bits 0, 2, 4 and 6 go to 2, 6, 10 and 14
        lines += [f"shr.b32 u, $5, {odd};", "and.b32 u, u, 0x00550055;"]
        lines += ["shl.b32 t, u, 4;", "lop3.b32 u, u, t, 0x05050505, 0xa8;"]  # (a | b) & c
        lines += ["shl.b32 t, u, 2;", "lop3.b32 u, u, t, 0x11111111, 0xa8;"]
        lines += ["shl.b32 u, u, 2;", "or.b32 n, n, u;"]
    lines.append("prmt.b32 n, n, 0, 0x3120;")  # the first two codes of both words, then the others
    if bits == 4:
        lines += ["shr.b32 u, n, 1;", "lop3.b32 u, u, 0x44444444, 0x32103210, 0xea;", "and.b32 n, n, 0x77777777;"]
    for half in range(2):
        for plane in range(2):
            to = "xy"[plane]
            first = 6 + 8 * plane
            if bits == 4:
                lines.append(f"prmt.b32 t, ${first}, ${first + 2}, n; prmt.b32 v, ${first + 4}, ${first + 6}, n;")
                lines.append(f"prmt.b32 {to}, t, v, u;")
            else:
                lines.append(f"prmt.b32 {to}, ${first}, ${first + 2}, n;")
        lines.append(f"prmt.b32 ${2 * half}, x, y, 0x6240; prmt.b32 ${2 * half + 1}, x, y, 0x7351;")
        if half == 0:
            lines.append("shr.b32 n, n, 16;")
            if bits == 4:
                lines.append("shr.b32 u, u, 16;")
    return "{.reg .b32 n, t, u, v, x, y; " + " ".join(lines) + "}"


@triton.jit
def entry_of_lane(table, NUMBERS: tl.constexpr, ASM: tl.constexpr):
    """What `weights` needs of a table for all rows: in every lane another entry, where assembly reads it."""
    if is_lane_table(NUMBERS) and ASM:
        source: tl.constexpr = lane_entry(bits_of_numbers(NUMBERS))
        at = table.to(tl.int64, bitcast=True)
        return tl.inline_asm_elementwise(source, "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1)
    return 0


@triton.jit
def table_words(pointer, T: tl.constexpr, C: tl.constexpr):
    """The eight words of the tables of the rows, as wide as those of codes. pointer: (1, R, 1), or (R, 1) for T 0."""
    return (
        table_word(pointer, T, C), table_word(pointer + 1, T, C), table_word(pointer + 2, T, C),
        table_word(pointer + 3, T, C), table_word(pointer + 4, T, C), table_word(pointer + 5, T, C),
        table_word(pointer + 6, T, C), table_word(pointer + 7, T, C),
    )  # fmt: skip


@triton.jit
def table_word(pointer, T: tl.constexpr, C: tl.constexpr):
    word = tl.load(pointer)
    if T:
        return tl.broadcast_to(word, (T, word.shape[1], C))
    else:
        return tl.broadcast_to(word, (word.shape[0], C))


@triton.jit
def as_type(a, b, c, d, DT: tl.constexpr):
    """The same bits."""
    return a.to(DT, bitcast=True), b.to(DT, bitcast=True), c.to(DT, bitcast=True), d.to(DT, bitcast=True)


@triton.jit
def row_parts(low, high, t0, t1, t2, t3, t4, t5, t6, t7, NUMBERS: tl.constexpr, DT: tl.constexpr):
    """All parts of words as DT by the rows' own tables; four come twice where a word has no more."""
    constraints: tl.constexpr = "=r,=r,=r,=r" + ",r" * 18
    words = [low.to(tl.int16), high.to(tl.int16), t0, t1, t2, t3, t4, t5, t6, t7]
    even: tl.constexpr = row_lookup(NUMBERS, 0)
    a, b, c, d = tl.inline_asm_elementwise(
        even, constraints, words, dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
    )
    a, b, c, d = as_type(a, b, c, d, DT)
    if bits_of_numbers(NUMBERS) == 4:
        return a, b, c, d, a, b, c, d
    else:
        odd: tl.constexpr = row_lookup(NUMBERS, 1)
        e, f, g, h = tl.inline_asm_elementwise(
            odd, constraints, words, dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
        )
        e, f, g, h = as_type(e, f, g, h, DT)
        return a, e, b, f, c, g, d, h


@triton.jit
def part_of(a, b, c, d, e, f, g, h, PART: tl.constexpr):
    if PART < 4:
        if PART < 2:
            return a if PART == 0 else b
        else:
            return c if PART == 2 else d
    else:
        if PART < 6:
            return e if PART == 4 else f
        else:
            return g if PART == 6 else h


@triton.jit
def from_table(low, high, table, NUMBERS: tl.constexpr, PART: tl.constexpr, DT: tl.constexpr):
    """Part PART of the words, read from tables in memory. table: pointers to those of rows, that words broadcast to."""
    index = code(low, high, NUMBERS, PART)
    if is_row_table(NUMBERS):
        lower = tl.load(table + index // 4) >> (index % 4 * 8)
        upper = tl.load(table + 4 + index // 4) >> (index % 4 * 8)
        return ((lower & 0xFF) | (upper & 0xFF) << 8).to(tl.int16).to(DT, bitcast=True)
    return tl.load(table + index)


@triton.jit
def weights(
    low,
    high,
    zero,
    scale,
    table,
    lane,
    NUMBERS: tl.constexpr,
    PART: tl.constexpr,
    SCALED: tl.constexpr,
    EXACT: tl.constexpr,
    ASM: tl.constexpr,
    DT: tl.constexpr,
):
    """Part PART of the words as DT, times scale if SCALED. zero: DT and scale: float32, of the shape of the words.

    EXACT: DT holds every scale. table: as for `from_table`; lane: of `entry_of_lane`.
    """
    if is_table(NUMBERS):
        if is_lane_table(NUMBERS) and ASM:
            source: tl.constexpr = lane_lookup(NUMBERS, PART)
            words = [low.to(tl.int16), high.to(tl.int16), lane]
            value = tl.inline_asm_elementwise(source, "=r,=r,r,r,r,r", words, dtype=tl.float32, is_pure=True, pack=2)
        else:
            value = from_table(low, high, table, NUMBERS, PART, DT)
        if SCALED:
            value *= scale
        return value.to(DT)
    elif SCALED and EXACT:
        return decoded_scaled(low, high, zero, scale.to(DT), NUMBERS, PART, ASM, DT)
    elif SCALED:
        return (decoded(low, high, zero, NUMBERS, PART, ASM, DT).to(tl.float32) * scale).to(DT)
    else:
        return decoded(low, high, zero, NUMBERS, PART, ASM, DT)
