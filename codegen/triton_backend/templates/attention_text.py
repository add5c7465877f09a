"""Source of the three kernels of block-sparse attention. Blocks are listed row by row (forward, dq) and column by
column (dkv), as offsets and indices. What differs between uses is a compile-time constant, the distance between rows
too, because registers would hold it; batch, heads, sequence and layout are arguments.

The algorithm is FlashAttention-2's (Dao, 2023) over the listed blocks alone: softmax in base 2, the logarithm of its
denominator saved, probabilities recomputed in backward, no atomics. ``delta`` of its backward, the sum over ``dim`` of
gradient times result, is made by the kernel of dq, which reads both anyway, and is stored for the kernel of dkv. The
backward of a query that sees nothing (lse -inf) needs no care: each of its weights is hidden, or in no listed block.
"""

HEAD = '''"""{title}

reads: {operands} [batch, heads, seq, dim] {dtype}, rows {rows} elements apart;{statistics}
    padding uint8 [batch, seq], 1 where a key is hidden (not read unless PADDED);
    offsets int32 [layout_heads, blocks + 1] and indices int32: the {listed} of each block {of}
writes: {results}
computes: {nodes}
moves: {moves} bytes, listed being the layout's blocks over all heads;
    every input and output once: {ideal}
"""
'''

LOAD = '''
import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, first, seq, row_stride, TILE: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
              RAGGED: tl.constexpr):
    """Rows first to first + TILE, zero outside the tensor."""
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_BLOCK)
    where = ptr + (first + rows[:, None]).to(tl.int64) * row_stride + dims[None, :]
    if RAGGED:
        tile = tl.load(where, mask=(first + rows < seq)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM < DIM_BLOCK:
        tile = tl.load(where, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(where)
    return tile
'''

ROWS = '''

@triton.jit
def load_rows(ptr, rows, seq, outside, RAGGED: tl.constexpr):
    """One fp32 value a row."""
    if RAGGED:
        values = tl.load(ptr + rows, mask=rows < seq, other=outside)
    else:
        values = tl.load(ptr + rows)
    return values
'''

STORE = '''

@triton.jit
def store_tile(ptr, first, seq, row_stride, tile, TILE: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
               RAGGED: tl.constexpr):
    """Rows first to first + TILE, rounded to the tensor's type; nothing outside it."""
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_BLOCK)
    where = ptr + (first + rows[:, None]).to(tl.int64) * row_stride + dims[None, :]
    if RAGGED:
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=(first + rows < seq)[:, None] & (dims < DIM)[None, :])
    elif DIM < DIM_BLOCK:
        tl.store(where, tile.to(ptr.dtype.element_ty), mask=(dims < DIM)[None, :])
    else:
        tl.store(where, tile.to(ptr.dtype.element_ty))
'''

VISIBLE = '''

@triton.jit
def hide(values, rows, cols, padding_ptr, seq, CAUSAL: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr,
         hidden):
    """Values of [rows, cols], with ``hidden`` where a query may not see the key."""
    if RAGGED:
        values = tl.where((cols < seq)[None, :], values, hidden)
    if CAUSAL:
        values = tl.where(rows[:, None] >= cols[None, :], values, hidden)
    if PADDED:
        padding = tl.load(padding_ptr + cols, mask=cols < seq, other=1)
        values = tl.where((padding == 0)[None, :], values, hidden)
    return values
'''

_CONSTANTS = """\
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, SCALE: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, GRAD_ROW: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    PARTS: tl.constexpr = BLOCK // TILE
    blocks = tl.cdiv(seq, BLOCK)
    part = tl.program_id(0) % (blocks * PARTS)
    pair = tl.program_id(0) // (blocks * PARTS)
    sample = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    first = part * TILE
"""

_LISTING = """    entry = (head % layout_heads) * (blocks + 1) + part // PARTS
    begin = tl.load(offsets_ptr + entry)
    end = tl.load(offsets_ptr + entry + 1)
"""

_INPUTS = """    q_ptr += sample * q_batch + head * q_head
    k_ptr += sample * k_batch + head * k_head
    v_ptr += sample * v_batch + head * v_head
"""

FORWARD = (
    STORE
    + VISIBLE
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, padding_ptr, offsets_ptr, indices_ptr, out_ptr, lse_ptr, heads, layout_heads, seq,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
"""
    + _CONSTANTS
    + _INPUTS
    + """    lse_ptr += pair.to(tl.int64) * seq
    padding_ptr += sample * seq
    rows = first + tl.arange(0, TILE)
    q = load_tile(q_ptr, first, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    top = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
"""
    + _LISTING
    + """    for step in range(begin * PARTS, end * PARTS):
        start = tl.load(indices_ptr + step // PARTS) * BLOCK + (step % PARTS) * TILE
        cols = start + tl.arange(0, TILE)
        k = load_tile(k_ptr, start, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr, start, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
        score = hide(score, rows, cols, padding_ptr, seq, CAUSAL, PADDED, RAGGED, -1.0e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        weight = hide(weight, rows, cols, padding_ptr, seq, CAUSAL, PADDED, RAGGED, 0.0)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    out_ptr += (sample * seq * heads + head) * DIM
    store_tile(out_ptr, first, seq, heads * DIM, out, TILE, DIM, DIM_BLOCK, RAGGED)
    if RAGGED:
        tl.store(lse_ptr + rows, lse, mask=rows < seq)
    else:
        tl.store(lse_ptr + rows, lse)
"""
)

BACKWARD_Q = (
    ROWS
    + STORE
    + VISIBLE
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, padding_ptr, offsets_ptr, indices_ptr, dq_ptr, delta_ptr,
    heads, layout_heads, seq, q_batch, q_head, k_batch, k_head, v_batch, v_head,
    grad_batch, grad_head,
"""
    + _CONSTANTS
    + _INPUTS
    + """    grad_ptr += sample * grad_batch + head * grad_head
    out_ptr += (sample * seq * heads + head) * DIM
    lse_ptr += pair.to(tl.int64) * seq
    delta_ptr += pair.to(tl.int64) * seq
    padding_ptr += sample * seq
    rows = first + tl.arange(0, TILE)
    lse = load_rows(lse_ptr, rows, seq, float("inf"), RAGGED) * LOG2E
    out = load_tile(out_ptr, first, seq, heads * DIM, TILE, DIM, DIM_BLOCK, RAGGED)
    grad = load_tile(grad_ptr, first, seq, GRAD_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if RAGGED:
        tl.store(delta_ptr + rows, delta, mask=rows < seq)
    else:
        tl.store(delta_ptr + rows, delta)
    q = load_tile(q_ptr, first, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
"""
    + _LISTING
    + """    for step in range(begin * PARTS, end * PARTS):
        start = tl.load(indices_ptr + step // PARTS) * BLOCK + (step % PARTS) * TILE
        cols = start + tl.arange(0, TILE)
        k = load_tile(k_ptr, start, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr, start, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)
        weight = tl.exp2(score - lse[:, None])
        weight = hide(weight, rows, cols, padding_ptr, seq, CAUSAL, PADDED, RAGGED, 0.0)
        inner = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        slope = weight * (inner - delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    dq_ptr += (sample * seq * heads + head) * DIM
    store_tile(dq_ptr, first, seq, heads * DIM, acc * SCALE, TILE, DIM, DIM_BLOCK, RAGGED)
"""
)

BACKWARD_KV = (
    ROWS
    + STORE
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, padding_ptr, offsets_ptr, indices_ptr, dk_ptr, dv_ptr,
    heads, layout_heads, seq, q_batch, q_head, k_batch, k_head, v_batch, v_head,
    grad_batch, grad_head,
"""
    + _CONSTANTS
    + _INPUTS
    + """    grad_ptr += sample * grad_batch + head * grad_head
    lse_ptr += pair.to(tl.int64) * seq
    delta_ptr += pair.to(tl.int64) * seq
    cols = first + tl.arange(0, TILE)
    k = load_tile(k_ptr, first, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    v = load_tile(v_ptr, first, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    seen = cols < seq
    if PADDED:
        seen = tl.load(padding_ptr + sample * seq + cols, mask=cols < seq, other=1) == 0
    dk = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    dv = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
"""
    + _LISTING
    + """    for step in range(begin * PARTS, end * PARTS):
        start = tl.load(indices_ptr + step // PARTS) * BLOCK + (step % PARTS) * TILE
        rows = start + tl.arange(0, TILE)
        q = load_tile(q_ptr, start, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        grad = load_tile(grad_ptr, start, seq, GRAD_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (SCALE * LOG2E)
        lse = load_rows(lse_ptr, rows, seq, float("inf"), RAGGED) * LOG2E
        weight = tl.exp2(score - lse[None, :])
        if RAGGED or PADDED:
            weight = tl.where(seen[:, None], weight, 0.0)
        if CAUSAL:
            weight = tl.where(rows[None, :] >= cols[:, None], weight, 0.0)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
        inner = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        delta = load_rows(delta_ptr, rows, seq, 0.0, RAGGED)
        slope = weight * (inner - delta[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr += (sample * seq * heads + head) * DIM
    dv_ptr += (sample * seq * heads + head) * DIM
    store_tile(dk_ptr, first, seq, heads * DIM, dk * SCALE, TILE, DIM, DIM_BLOCK, RAGGED)
    store_tile(dv_ptr, first, seq, heads * DIM, dv, TILE, DIM, DIM_BLOCK, RAGGED)
"""
)
