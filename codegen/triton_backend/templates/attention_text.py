"""Source of the three kernels of block-sparse attention. Blocks are listed row by row (forward, dq) and column by
column (dkv), as offsets and indices; everything that differs between uses is a compile-time constant.

The algorithm is FlashAttention-2's (Dao, 2023) over the listed blocks alone: softmax in base 2, statistics saved as
``log2`` of the sum, recomputed probabilities in backward, no atomics.
"""

HEAD = '''"""{title}

reads and writes: q, k, v, out and their gradients [batch, heads, seq, dim], contiguous; lse and delta fp32
    [batch, heads, seq]; keep int8 [batch, seq], 0 where a key is padding; offsets int32 [heads, blocks + 1] and
    indices int32: the {listed} of each block {of}, per head
moves: {moves} bytes for {listed_blocks} listed blocks of {block} x {block}
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, rows, seq, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    dims = tl.arange(0, DIM_BLOCK)
    where = ptr + rows[:, None] * DIM + dims[None, :]
    if RAGGED:
        tile = tl.load(where, mask=(rows < seq)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM < DIM_BLOCK:
        tile = tl.load(where, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(where)
    return tile


@triton.jit
def store_tile(ptr, rows, seq, tile, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    dims = tl.arange(0, DIM_BLOCK)
    where = ptr + rows[:, None] * DIM + dims[None, :]
    if RAGGED:
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=(rows < seq)[:, None] & (dims < DIM)[None, :])
    elif DIM < DIM_BLOCK:
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=(dims < DIM)[None, :])
    else:
        tl.store(where, tile.to(ptr.dtype.element_ty))
'''

FORWARD = """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, keep_ptr, offsets_ptr, indices_ptr, out_ptr, lse_ptr, heads, seq,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row_block = part // (BLOCK // TILE)
    base = head.to(tl.int64) * seq
    rows = part * TILE + tl.arange(0, TILE)
    rows_inside = rows < seq
    q = load_tile(q_ptr + base * DIM, rows, seq, DIM, DIM_BLOCK, RAGGED)
    top = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    blocks = tl.cdiv(seq, BLOCK)
    entry = (head % heads) * (blocks + 1) + row_block
    first = tl.load(offsets_ptr + entry)
    last = tl.load(offsets_ptr + entry + 1)
    for step in range(first * (BLOCK // TILE), last * (BLOCK // TILE)):
        listed = tl.load(indices_ptr + step // (BLOCK // TILE))
        cols = listed * BLOCK + (step % (BLOCK // TILE)) * TILE + tl.arange(0, TILE)
        k = load_tile(k_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        visible = tl.full([TILE, TILE], 1, tl.int1)
        if RAGGED:
            visible = visible & (cols < seq)[None, :]
        if CAUSAL:
            visible = visible & (rows[:, None] >= cols[None, :])
        if PADDED:
            keep = tl.load(keep_ptr + (head // heads).to(tl.int64) * seq + cols, mask=cols < seq, other=0)
            visible = visible & (keep != 0)[None, :]
        if RAGGED or CAUSAL or PADDED:
            score = tl.where(visible, score, -1.0e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        if RAGGED or CAUSAL or PADDED:
            weight = tl.where(visible, weight, 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    store_tile(out_ptr + base * DIM, rows, seq, out, DIM, DIM_BLOCK, RAGGED)
    if RAGGED:
        tl.store(lse_ptr + base + rows, lse, mask=rows_inside)
    else:
        tl.store(lse_ptr + base + rows, lse)
"""

BACKWARD_Q = """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, keep_ptr, offsets_ptr, indices_ptr, dq_ptr, heads, seq,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    row_block = part // (BLOCK // TILE)
    base = head.to(tl.int64) * seq
    rows = part * TILE + tl.arange(0, TILE)
    if RAGGED:
        lse = tl.load(lse_ptr + base + rows, mask=rows < seq, other=float("inf"))
        delta = tl.load(delta_ptr + base + rows, mask=rows < seq, other=0.0)
    else:
        lse = tl.load(lse_ptr + base + rows)
        delta = tl.load(delta_ptr + base + rows)
    q = load_tile(q_ptr + base * DIM, rows, seq, DIM, DIM_BLOCK, RAGGED)
    grad = load_tile(grad_ptr + base * DIM, rows, seq, DIM, DIM_BLOCK, RAGGED)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    blocks = tl.cdiv(seq, BLOCK)
    entry = (head % heads) * (blocks + 1) + row_block
    first = tl.load(offsets_ptr + entry)
    last = tl.load(offsets_ptr + entry + 1)
    for step in range(first * (BLOCK // TILE), last * (BLOCK // TILE)):
        listed = tl.load(indices_ptr + step // (BLOCK // TILE))
        cols = listed * BLOCK + (step % (BLOCK // TILE)) * TILE + tl.arange(0, TILE)
        k = load_tile(k_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        weight = tl.exp2(score - lse[:, None])
        visible = tl.full([TILE, TILE], 1, tl.int1)
        if RAGGED:
            visible = visible & (cols < seq)[None, :]
        if CAUSAL:
            visible = visible & (rows[:, None] >= cols[None, :])
        if PADDED:
            keep = tl.load(keep_ptr + (head // heads).to(tl.int64) * seq + cols, mask=cols < seq, other=0)
            visible = visible & (keep != 0)[None, :]
        if RAGGED or CAUSAL or PADDED:
            weight = tl.where(visible, weight, 0.0)
        inner = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        slope = weight * (inner - delta[:, None]) * SCALE
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    store_tile(dq_ptr + base * DIM, rows, seq, acc, DIM, DIM_BLOCK, RAGGED)
"""

BACKWARD_KV = """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, keep_ptr, offsets_ptr, indices_ptr, dk_ptr, dv_ptr, heads, seq,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
):
    part = tl.program_id(0)
    head = tl.program_id(1)
    col_block = part // (BLOCK // TILE)
    base = head.to(tl.int64) * seq
    cols = part * TILE + tl.arange(0, TILE)
    k = load_tile(k_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
    v = load_tile(v_ptr + base * DIM, cols, seq, DIM, DIM_BLOCK, RAGGED)
    key_inside = tl.full([TILE], 1, tl.int1)
    if RAGGED:
        key_inside = cols < seq
    if PADDED:
        keep = tl.load(keep_ptr + (head // heads).to(tl.int64) * seq + cols, mask=cols < seq, other=0)
        key_inside = key_inside & (keep != 0)
    dk = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    dv = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    blocks = tl.cdiv(seq, BLOCK)
    entry = (head % heads) * (blocks + 1) + col_block
    first = tl.load(offsets_ptr + entry)
    last = tl.load(offsets_ptr + entry + 1)
    for step in range(first * (BLOCK // TILE), last * (BLOCK // TILE)):
        listed = tl.load(indices_ptr + step // (BLOCK // TILE))
        rows = listed * BLOCK + (step % (BLOCK // TILE)) * TILE + tl.arange(0, TILE)
        if RAGGED:
            lse = tl.load(lse_ptr + base + rows, mask=rows < seq, other=float("inf"))
            delta = tl.load(delta_ptr + base + rows, mask=rows < seq, other=0.0)
        else:
            lse = tl.load(lse_ptr + base + rows)
            delta = tl.load(delta_ptr + base + rows)
        q = load_tile(q_ptr + base * DIM, rows, seq, DIM, DIM_BLOCK, RAGGED)
        grad = load_tile(grad_ptr + base * DIM, rows, seq, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        weight = tl.exp2(score - lse[None, :])
        if RAGGED or PADDED:
            weight = tl.where(key_inside[:, None], weight, 0.0)
        if CAUSAL:
            weight = tl.where(rows[None, :] >= cols[:, None], weight, 0.0)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
        inner = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        slope = weight * (inner - delta[None, :]) * SCALE
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr + base * DIM, cols, seq, dk, DIM, DIM_BLOCK, RAGGED)
    store_tile(dv_ptr + base * DIM, cols, seq, dv, DIM, DIM_BLOCK, RAGGED)
"""
