"""The kernels: products with few rows of activations, with more, the sum of partial products, and decoding.

``x (M, K) @ w.T`` with w (N, K) in the layout of triton_layout. Weights are the left operand of the tensor cores, which
takes them from registers as they are decoded; their rows fill it however few rows x has. Names in capitals are known
when a kernel is compiled. Common ones:

    NUMBERS, SCALE, UNITS, ZERO   of Spec; HAS_ZERO: the zero point is a tensor instead
    BOOST    2.0**Spec.boost where SCALED
    SCALED   scales go onto the weights before the product, else onto the product of their columns
    EXACT    the type of x holds every scale
    EVEN     no column is missing of the last step
    ASM      decode by inline assembly; else by its plain twin
    EXPERTS  weights that lie one after the other: rows of x are sorted by them, and ends (EXPERTS,) says where those of
             each end. 0: one weight. `finished` adds their sums (M, GROUPS) by offset (rows, GROUPS) where HAS_OFFSET
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_decode import (
    bits_of_numbers,
    decoded,
    entry,
    entry_of_lane,
    from_table,
    high_bits,
    is_row_table,
    is_table,
    low_bits,
    next_word,
    part_of,
    parts_of,
    parts_per_unit,
    power_of_2,
    row_parts,
    scale_bytes,
    table_words,
    unit,
    unit_at,
    weights,
)


@triton.jit
def words3(pointer, offsets, live, BLOCK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr):
    """Words of block BLOCK as (T, 16 * S, columns). offsets: (2, T, S, 256), or (T, S, 256) for one half."""
    if MASKED:
        words = tl.load(pointer + offsets + BLOCK * 512, mask=live, other=0, eviction_policy="evict_first")
    else:
        words = tl.load(pointer + offsets + BLOCK * 512, eviction_policy="evict_first")
    if len(words.shape) == 4:
        words = tl.permute(tl.reshape(words, (2, T, S, 8, 4, 2, 2, 2)), (1, 2, 6, 3, 0, 5, 4, 7))
        return tl.reshape(words, (T, 16 * S, 32))
    else:
        words = tl.permute(tl.reshape(words, (T, S, 8, 4, 2, 2, 2)), (0, 1, 5, 2, 4, 3, 6))
        return tl.reshape(words, (T, 16 * S, 16))


@triton.jit
def tile_of(ends_ptr, slot, M, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row of x, end of the expert's rows) of tile `slot`, where each expert's rows are cut into tiles.

    Expert EXPERTS or more: there are fewer tiles. Every program finds its own: no list of them has to be made before.
    """
    e = tl.arange(0, power_of_2(EXPERTS))
    ends = tl.minimum(tl.load(ends_ptr + e, mask=e < EXPERTS, other=0), M)
    starts = tl.minimum(tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < EXPERTS), other=0), M)
    tiles = tl.where(e < EXPERTS, (tl.maximum(ends - starts, 0) + BM - 1) // BM, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= slot).to(tl.int32), 0)
    own = e == expert
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(own, starts, 0), 0) + (slot - before) * BM
    return expert, first, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def finished(
    acc, n, m, M, N, row_ptr, bias_ptr, stride_bias, o_ptr, sums_ptr, offset_ptr, GROUPS,
    HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, BOOST: tl.constexpr,
):  # fmt: skip
    """Multiply (rows, BM) by the row's own factor, add the bias, round and store."""
    ok = (m < M)[None, :] & (n < N)[:, None]
    value = acc * (tl.load(row_ptr + n, mask=n < N, other=0.0) * (1.0 / BOOST))[:, None]
    if HAS_OFFSET:
        for g in range(0, GROUPS):
            offset = tl.load(offset_ptr + n * GROUPS + g, mask=n < N, other=0.0)
            value += offset[:, None] * tl.load(sums_ptr + m * GROUPS + g, mask=m < M, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + m[None, :].to(tl.int64) * stride_bias + n[:, None], mask=ok, other=0.0)
        value += bias.to(tl.float32)
    tl.store(o_ptr + m[None, :].to(tl.int64) * N + n[:, None], value.to(o_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M", "GROUPS"])
def gemv(
    x_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, row_ptr, bias_ptr, o_ptr, ends_ptr, sums_ptr, offset_ptr,
    M, N, K, stride_x, stride_bias, stride_table, STRIPS, STEPS, GROUPS,
    BM: tl.constexpr, S: tl.constexpr, T: tl.constexpr, NUMBERS: tl.constexpr, SCALE: tl.constexpr,
    UNITS: tl.constexpr, ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, BOOST: tl.constexpr, SCALED: tl.constexpr,
    EXACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """For few rows of x: a program owns 16 * S rows of w, and its T warps share out K.

    The product is batched with a warp to each batch, so the parts of a sum meet in the program: no workspace, no
    atomics and one launch. Every warp takes 256 columns of each T * 256.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    F16: tl.constexpr = DT == tl.float16
    P: tl.constexpr = parts_of(low_bits(bits_of_numbers(NUMBERS)))
    BLOCKS: tl.constexpr = 8 // P  # of the low part in a step
    HALVES: tl.constexpr = 2 if UNITS == 16 else 1  # products of 16 columns, where these have a scale
    C: tl.constexpr = 32 // HALVES
    R: tl.constexpr = 16 * S
    BYTES: tl.constexpr = scale_bytes(SCALE)
    WORDS: tl.constexpr = (UNITS * BYTES + 3) // 4 * 16
    ZERO_WORDS: tl.constexpr = (UNITS + 1) // 2 * 16
    PER_UNIT: tl.constexpr = parts_per_unit(UNITS)
    pid = tl.program_id(0)
    t = tl.arange(0, T)
    m = tl.arange(0, BM)
    if EXPERTS:
        expert, first_row, M = tile_of(ends_ptr, tl.program_id(1), M, BM, EXPERTS)
        if expert >= EXPERTS:
            return
        m += first_row
        low_ptr += expert.to(tl.int64) * STRIPS * STEPS * (512 * BLOCKS)
        high_ptr += expert.to(tl.int64) * STRIPS * STEPS * 512
        scale_ptr += expert.to(tl.int64) * STRIPS * STEPS * WORDS
        zero_ptr += expert.to(tl.int64) * STRIPS * STEPS * ZERO_WORDS
        table_ptr += expert.to(tl.int64) * STRIPS * 16 * stride_table
        row_ptr += expert * STRIPS * 16
        bias_ptr += expert * N
        offset_ptr += expert.to(tl.int64) * STRIPS * 16 * GROUPS
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    strip = tl.minimum(pid * S + tl.arange(0, S), STRIPS - 1)
    n = tl.minimum(pid * S + r // 16, STRIPS - 1) * 16 + r % 16
    piece = (strip[None, :, None] * STEPS + t[:, None, None]) * 512
    if HALVES == 1:
        half = tl.arange(0, 2)[:, None, None, None] * 256 + tl.arange(0, 256)[None, None, None, :]
        lows = piece[None, :, :, :] * BLOCKS + half
        highs = piece[None, :, :, :] + half
    else:
        lows = piece * BLOCKS + tl.arange(0, 256)[None, None, :]
        highs = piece + tl.arange(0, 256)[None, None, :]
    place = (n // 16 * STEPS)[None, :] + t[:, None]
    scales = scale_ptr + place * WORDS + (n % 16)[None, :]
    zeros = zero_ptr + place * ZERO_WORDS + (n % 16)[None, :]
    table = table_ptr + (n * stride_table)[None, :, None]
    lane = entry_of_lane(table_ptr, NUMBERS, ASM)
    BYTE_TABLE: tl.constexpr = is_row_table(NUMBERS) and ASM
    if BYTE_TABLE:
        t0, t1, t2, t3, t4, t5, t6, t7 = table_words(table_ptr + (n * stride_table)[None, :, None], T, C)
    xs = x_ptr + m[None, None, :].to(tl.int64) * stride_x + c[None, :, None] + t[:, None, None] * 256
    rows_ok = (m < M)[None, None, :]
    acc = tl.zeros((T, R, BM), dtype=tl.float32)
    word = tl.zeros((T, R), dtype=tl.int32)
    zero_word = word
    scale = tl.zeros((T, R), dtype=tl.float32)
    zero = tl.full((T, R, C), -ZERO * unit(NUMBERS, F16), DT)
    for i in tl.range(0, tl.cdiv(STEPS, T), num_stages=STAGES):
        live = t + i * T < STEPS
        if HALVES == 1:
            alive = live[None, :, None, None]
        else:
            alive = live[:, None, None]
        y = tl.zeros((T, R, BM), dtype=tl.float32)
        for p in tl.static_range(8):
            if p % P == 0:
                low = words3(low_ptr, lows, alive, p // P, T, S, not EVEN)
                if HALVES == 2:
                    low2 = words3(low_ptr, lows + 256, alive, p // P, T, S, not EVEN)
            if p == 0:
                if high_bits(bits_of_numbers(NUMBERS)):
                    high = words3(high_ptr, highs, alive, 0, T, S, not EVEN)
                    if HALVES == 2:
                        high2 = words3(high_ptr, highs + 256, alive, 0, T, S, not EVEN)
                else:
                    high = low
                    if HALVES == 2:
                        high2 = low2
            for h in tl.static_range(HALVES):
                if UNITS and p % PER_UNIT == 0:
                    word = next_word(word, scales, live[:, None], unit_at(p, UNITS, h), BYTES, not EVEN)
                    scale = entry(word, unit_at(p, UNITS, h), SCALE)
                    if HAS_ZERO:
                        zero_word = next_word(zero_word, zeros, live[:, None], unit_at(p, UNITS, h), 2, not EVEN)
                        zero = entry(zero_word, unit_at(p, UNITS, h), "fp16" if F16 else "bf16").to(DT)
                        zero = tl.broadcast_to(zero[:, :, None], (T, R, C))
                if h == 0:
                    now = low
                    now_high = high
                else:
                    now = low2
                    now_high = high2
                if BYTE_TABLE:
                    if p % P == 0:
                        w0, w1, w2, w3, w4, w5, w6, w7 = row_parts(
                            low, high, t0, t1, t2, t3, t4, t5, t6, t7, NUMBERS, DT
                        )  # fmt: skip
                    w = part_of(w0, w1, w2, w3, w4, w5, w6, w7, p % P)
                else:
                    w = weights(
                        now, now_high, zero, tl.broadcast_to((scale * BOOST)[:, :, None], (T, R, C)), table, lane,
                        NUMBERS, p, SCALED, EXACT, ASM, DT,
                    )  # fmt: skip
                column = p * 32 + h * 16
                ok = rows_ok
                if not EVEN:
                    ok = ok & ((t * 256 + i * T * 256 + column)[:, None, None] + c[None, :, None] < K)
                x = tl.load(xs + column, mask=ok, other=0.0)
                if SCALED or UNITS == 0:
                    acc = tl.dot(w, x, acc)
                elif p % PER_UNIT == PER_UNIT - 1:
                    acc += tl.dot(w, x, y) * scale[:, :, None]
                    y = tl.zeros((T, R, BM), dtype=tl.float32)
                else:
                    y = tl.dot(w, x, y)
        lows += T * 512 * BLOCKS
        highs += T * 512
        scales += T * WORDS
        zeros += T * ZERO_WORDS
        xs += T * 256
    n = pid * R + r
    finished(
        tl.sum(acc, axis=0), n, m, M, N, row_ptr, bias_ptr, stride_bias, o_ptr, sums_ptr, offset_ptr, GROUPS,
        HAS_BIAS, HAS_OFFSET, BOOST,
    )  # fmt: skip


@triton.jit
def words2(pointer, offsets, BLOCK: tl.constexpr, S: tl.constexpr):
    """Words of block BLOCK as (16 * S, 32). offsets: (2, S, 256)."""
    words = tl.load(pointer + offsets + BLOCK * 512)
    words = tl.permute(tl.reshape(words, (2, S, 8, 4, 2, 2, 2)), (1, 5, 2, 0, 4, 3, 6))
    return tl.reshape(words, (16 * S, 32))


@triton.jit
def beside(a, b):
    """(rows, columns) twice -> (rows, 2 * columns), in registers."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit(do_not_specialize=["M", "GROUPS"])
def gemm(
    x_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, row_ptr, bias_ptr, o_ptr, ends_ptr, sums_ptr, offset_ptr,
    work_ptr,
    M, N, K, stride_x, stride_bias, stride_table, STRIPS, STEPS, GROUPS, SHARE,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, NUMBERS: tl.constexpr, SCALE: tl.constexpr,
    UNITS: tl.constexpr, ZERO: tl.constexpr, HAS_ZERO: tl.constexpr, BOOST: tl.constexpr, SCALED: tl.constexpr,
    EXACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns BN rows of w, BM of x and SHARE steps of 256 columns; two products of 128 columns to a step.

    Where K is split, partial sums go to work (SPLIT, M, N) float32, for `reduce` to add in order. Not SCALED only with
    two scales to a step or fewer: others would need a product for each.
    """
    DT: tl.constexpr = x_ptr.dtype.element_ty
    F16: tl.constexpr = DT == tl.float16
    P: tl.constexpr = parts_of(low_bits(bits_of_numbers(NUMBERS)))
    BLOCKS: tl.constexpr = 8 // P
    S: tl.constexpr = BN // 16
    BYTES: tl.constexpr = scale_bytes(SCALE)
    WORDS: tl.constexpr = (UNITS * BYTES + 3) // 4 * 16
    ZERO_WORDS: tl.constexpr = (UNITS + 1) // 2 * 16
    PER_UNIT: tl.constexpr = parts_per_unit(UNITS)
    tl.static_assert(SCALED or UNITS <= 2)
    pn = tl.program_id(0)
    pk = tl.program_id(1)
    pm = tl.program_id(2)
    m = pm * BM + tl.arange(0, BM)
    if EXPERTS:
        expert, first_row, M = tile_of(ends_ptr, pm, M, BM, EXPERTS)
        if expert >= EXPERTS:
            return
        m = first_row + tl.arange(0, BM)
        low_ptr += expert.to(tl.int64) * STRIPS * STEPS * (512 * BLOCKS)
        high_ptr += expert.to(tl.int64) * STRIPS * STEPS * 512
        scale_ptr += expert.to(tl.int64) * STRIPS * STEPS * WORDS
        zero_ptr += expert.to(tl.int64) * STRIPS * STEPS * ZERO_WORDS
        table_ptr += expert.to(tl.int64) * STRIPS * 16 * stride_table
        row_ptr += expert * STRIPS * 16
        bias_ptr += expert * N
        offset_ptr += expert.to(tl.int64) * STRIPS * 16 * GROUPS
    first = pk * SHARE
    strip = tl.minimum(pn * S + tl.arange(0, S), STRIPS - 1)
    rows = pn * BN + tl.arange(0, BN)
    n = tl.minimum(rows // 16, STRIPS - 1) * 16 + rows % 16
    k = tl.arange(0, 128)
    half = tl.arange(0, 2)[:, None, None] * 256 + tl.arange(0, 256)[None, None, :]
    lows = (strip * STEPS + first)[None, :, None] * (512 * BLOCKS) + half
    highs = (strip * STEPS + first)[None, :, None] * 512 + half
    scales = scale_ptr + (n // 16 * STEPS + first) * WORDS + n % 16
    zeros = zero_ptr + (n // 16 * STEPS + first) * ZERO_WORDS + n % 16
    table = table_ptr + (n * stride_table)[:, None]
    lane = entry_of_lane(table_ptr, NUMBERS, ASM)
    BYTE_TABLE: tl.constexpr = is_row_table(NUMBERS) and ASM
    if BYTE_TABLE:
        t0, t1, t2, t3, t4, t5, t6, t7 = table_words(table, 0, 32)
    xs = x_ptr + m[None, :].to(tl.int64) * stride_x + k[:, None] + first * 256
    rows_ok = (m < M)[None, :]
    second = (tl.arange(0, 32) >= 16)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    word = tl.zeros((BN,), dtype=tl.int32)
    zero_word = word
    scale = tl.zeros((BN,), dtype=tl.float32)
    zero = tl.full((BN, 32), -ZERO * unit(NUMBERS, F16), DT)
    for i in tl.range(first, tl.minimum(first + SHARE, STEPS), num_stages=STAGES):
        y = tl.zeros((BN, BM), dtype=tl.float32)
        for p in tl.static_range(8):
            if p % P == 0:
                low = words2(low_ptr, lows, p // P, S)
            if p == 0:
                if high_bits(bits_of_numbers(NUMBERS)):
                    high = words2(high_ptr, highs, 0, S)
                else:
                    high = low
            if UNITS and p % PER_UNIT == 0:
                word = next_word(word, scales, True, unit_at(p, UNITS, 0), BYTES, False)
                scale = entry(word, unit_at(p, UNITS, 0), SCALE)
                if HAS_ZERO:
                    zero_word = next_word(zero_word, zeros, True, unit_at(p, UNITS, 0), 2, False)
                    zero = entry(zero_word, unit_at(p, UNITS, 0), "fp16" if F16 else "bf16").to(DT)
                    zero = tl.broadcast_to(zero[:, None], (BN, 32))
            factor = tl.broadcast_to((scale * BOOST)[:, None], (BN, 32))
            if UNITS == 16:
                word = next_word(word, scales, True, unit_at(p, UNITS, 1), BYTES, False)
                factor = tl.where(second, (entry(word, unit_at(p, UNITS, 1), SCALE) * BOOST)[:, None], factor)
                if HAS_ZERO:
                    zero_word = next_word(zero_word, zeros, True, unit_at(p, UNITS, 1), 2, False)
                    other = entry(zero_word, unit_at(p, UNITS, 1), "fp16" if F16 else "bf16").to(DT)
                    zero = tl.where(second, other[:, None], zero)
            if BYTE_TABLE:
                if p % P == 0:
                    w0, w1, w2, w3, w4, w5, w6, w7 = row_parts(
                        low, high, t0, t1, t2, t3, t4, t5, t6, t7, NUMBERS, DT
                    )  # fmt: skip
                w = part_of(w0, w1, w2, w3, w4, w5, w6, w7, p % P)
            else:
                w = weights(low, high, zero, factor, table, lane, NUMBERS, p, SCALED, EXACT, ASM, DT)
            if p % 2 == 0:
                even = w
            elif p % 4 == 1:
                first64 = beside(even, w)
            else:
                w128 = beside(first64, beside(even, w))
                ok = rows_ok
                if not EVEN:
                    ok = ok & ((i * 256 + p // 4 * 128 + k)[:, None] < K)
                x = tl.load(xs + p // 4 * 128, mask=ok, other=0.0)
                if SCALED or UNITS == 0:
                    acc = tl.dot(w128, x, acc)
                elif UNITS == 2:
                    acc += tl.dot(w128, x) * scale[:, None]
                elif p == 3:
                    y = tl.dot(w128, x)
                else:
                    acc += tl.dot(w128, x, y) * scale[:, None]
        lows += 512 * BLOCKS
        highs += 512
        scales += WORDS
        zeros += ZERO_WORDS
        xs += 256
    if SPLIT > 1:
        ok = rows_ok & (rows < N)[:, None]
        place = pk.to(tl.int64) * M * N + m[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(work_ptr + place, acc, mask=ok)
    else:
        finished(
            acc, rows, m, M, N, row_ptr, bias_ptr, stride_bias, o_ptr, sums_ptr, offset_ptr, GROUPS,
            HAS_BIAS, HAS_OFFSET, BOOST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def reduce(
    work_ptr, row_ptr, bias_ptr, o_ptr, M, N, stride_bias,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, BOOST: tl.constexpr,
):  # fmt: skip
    """Add the SPLIT partial sums of work (SPLIT, M, N) in order, for BLOCK columns of one row of x."""
    m = tl.program_id(1) + tl.arange(0, 1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = (m.to(tl.int64) * N)[None, :] + n[:, None]
    ok = (n < N)[:, None]
    acc = tl.zeros((BLOCK, 1), dtype=tl.float32)
    for j in tl.static_range(SPLIT):
        acc += tl.load(work_ptr + j * M.to(tl.int64) * N + place, mask=ok, other=0.0)
    finished(acc, n, m, M, N, row_ptr, bias_ptr, stride_bias, o_ptr, row_ptr, row_ptr, 0, HAS_BIAS, False, BOOST)


@triton.jit
def dequantize(
    low_ptr, high_ptr, scale_ptr, zero_ptr, table_ptr, row_ptr, offset_ptr, o_ptr, N, K, PADDED, GROUPS,
    stride_table, STEPS,
    NUMBERS: tl.constexpr, SCALE: tl.constexpr, UNITS: tl.constexpr, ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_OFFSET: tl.constexpr, ASM: tl.constexpr, F16: tl.constexpr,
):  # fmt: skip
    """A program decodes 16 rows by 256 columns to o (N, K), in float32 and rounded once, as `decode` does.

    F16: the layout is that for float16.
    """
    DT: tl.constexpr = tl.float16 if F16 else tl.bfloat16
    P: tl.constexpr = parts_of(low_bits(bits_of_numbers(NUMBERS)))
    BLOCKS: tl.constexpr = 8 // P
    BYTES: tl.constexpr = scale_bytes(SCALE)
    WORDS: tl.constexpr = (UNITS * BYTES + 3) // 4 * 16
    ZERO_WORDS: tl.constexpr = (UNITS + 1) // 2 * 16
    strip = tl.program_id(0)
    step = tl.program_id(1)
    place = strip * STEPS + step
    r = tl.arange(0, 16)
    c = tl.arange(0, 32)
    n = strip * 16 + r
    half = tl.arange(0, 2)[:, None, None] * 256 + tl.arange(0, 256)[None, None, :]
    scales = scale_ptr + place * WORDS + r
    zeros = zero_ptr + place * ZERO_WORDS + r
    table = table_ptr + (n * stride_table)[:, None]
    row = tl.load(row_ptr + n, mask=n < N, other=0.0)[:, None]
    zero = tl.full((16, 32), -ZERO * unit(NUMBERS, F16), DT)
    factor = tl.broadcast_to(row, (16, 32))
    for p in tl.static_range(8):
        if p % P == 0:
            low = words2(low_ptr, place * (512 * BLOCKS) + half, p // P, 1)
        if p == 0:
            if high_bits(bits_of_numbers(NUMBERS)):
                high = words2(high_ptr, place * 512 + half, 0, 1)
            else:
                high = low
        if UNITS:
            u = (p * 32 + c) * UNITS // 256
            word = tl.load(scales[:, None] + (u * BYTES // 4 * 16)[None, :])
            shift = (u * BYTES % 4 * 8)[None, :]
            factor = entry(word >> shift, 0, SCALE) * row
            if HAS_ZERO:
                word = tl.load(zeros[:, None] + (u // 2 * 16)[None, :])
                zero = entry(word >> (u % 2 * 16)[None, :], 0, "fp16" if F16 else "bf16").to(DT)
        k = step * 256 + p * 32 + c
        if is_table(NUMBERS):
            value = from_table(low, high, table, NUMBERS, p, DT).to(tl.float32) * factor
        else:
            value = decoded(low, high, zero, NUMBERS, p, ASM, DT).to(tl.float32) * factor
        ok = (n < N)[:, None] & (k < K)[None, :]
        if HAS_OFFSET:
            value += tl.load(offset_ptr + (n * GROUPS)[:, None] + (k // PADDED)[None, :], mask=ok, other=0.0)
        tl.store(o_ptr + n[:, None].to(tl.int64) * K + k[None, :], value.to(o_ptr.dtype.element_ty), mask=ok)
