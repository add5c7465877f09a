"""Source of the four kernels of Evoformer attention: attention of every sequence of an alignment to itself, with a mask
for each sequence and a bias for each pair of residues, which all sequences share.

FlashAttention-2's algorithm (Dao, 2023) with biases; ``delta`` is made by the kernel of dq, as in ``attention_text``.
Scores stay natural logarithms until a row's maximum is subtracted, so that masks of the dtype's lowest number mean what
they mean in PyTorch. No atomics, so results are the same bits on every run: the gradient of the pair bias, a sum over
sequences, has a kernel of its own, whose programs each keep one tile and walk the sequences; the gradient of the mask,
a sum over queries and heads, leaves the kernel of dk and dv as one row a head.
"""

HEAD = '''"""{title}

reads: {operands} [batch, sequences, seq, heads, dim] {dtype}, rows {rows} and
    heads {heads} elements apart;{statistics}
    mask [batch, sequences, seq] and pair [batch, heads, seq, seq], added to the scores (not read unless MASKED, PAIRED)
writes: {results}
computes: {nodes}
moves: {moves}
"""
'''

BIASED = '''

@triton.jit
def biased(score, rows, cols, mask_ptr, pair_ptr, seq, pair_row, MASKED: tl.constexpr, PAIRED: tl.constexpr,
           RAGGED: tl.constexpr, KEYS_DOWN: tl.constexpr):
    """Scores with their biases added: [queries, keys], or KEYS_DOWN [keys, queries]."""
    if PAIRED:
        where = pair_ptr + rows[:, None].to(tl.int64) * pair_row + cols[None, :]
        if RAGGED:
            pair = tl.load(where, mask=(rows < seq)[:, None] & (cols < seq)[None, :], other=0.0)
        else:
            pair = tl.load(where)
        if KEYS_DOWN:
            pair = tl.trans(pair)
        score += pair.to(tl.float32)
    if KEYS_DOWN:
        cols = cols[:, None]
    else:
        cols = cols[None, :]
    if MASKED:
        if RAGGED:
            score += tl.load(mask_ptr + cols, mask=cols < seq, other=0.0).to(tl.float32)
        else:
            score += tl.load(mask_ptr + cols).to(tl.float32)
    if RAGGED:
        score = tl.where(cols < seq, score, float("-inf"))
    return score
'''

LOGARITHMS = '''

@triton.jit
def load_lse(ptr, rows, seq, RAGGED: tl.constexpr):
    """Per query what its scores are shifted by; infinite where it sees nothing: all its weights are 0."""
    if RAGGED:
        lse = tl.load(ptr + rows, mask=rows < seq, other=float("inf"))
    else:
        lse = tl.load(ptr + rows)
    return tl.where(lse == float("-inf"), float("inf"), lse)
'''

_CONSTANTS = """\
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MASKED: tl.constexpr, PAIRED: tl.constexpr, MASK_GRAD: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, SCALE: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, GRAD_ROW: tl.constexpr,
    Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr, GRAD_HEAD: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    tiles = tl.cdiv(seq, TILE)
"""

_PROGRAM = """    first = tl.program_id(0) % tiles * TILE
    rest = tl.program_id(0) // tiles
    sequence = (rest % sequences).to(tl.int64)
    head = (rest // sequences % heads).to(tl.int64)
    sample = (rest // sequences // heads).to(tl.int64)
    alignment = sample * sequences + sequence
    q_ptr += sample * q_batch + sequence * q_sequence + head * Q_HEAD
    k_ptr += sample * k_batch + sequence * k_sequence + head * K_HEAD
    v_ptr += sample * v_batch + sequence * v_sequence + head * V_HEAD
    mask_ptr += sample * mask_batch + sequence * mask_sequence
    pair_ptr += sample * pair_batch + head * pair_head
"""

_STRIDES = """    heads, sequences, seq, q_batch, q_sequence, k_batch, k_sequence, v_batch, v_sequence,
    mask_batch, mask_sequence, pair_batch, pair_head, pair_row,
"""

_GRAD_STRIDES = """    heads, sequences, seq, q_batch, q_sequence, k_batch, k_sequence, v_batch, v_sequence,
    grad_batch, grad_sequence, mask_batch, mask_sequence, pair_batch, pair_head, pair_row,
"""

FORWARD = (
    BIASED
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, mask_ptr, pair_ptr, out_ptr, lse_ptr,
"""
    + _STRIDES
    + _CONSTANTS
    + _PROGRAM
    + """    lse_ptr += (alignment * heads + head) * seq
    rows = first + tl.arange(0, TILE)
    q = load_tile(q_ptr, first, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.full([TILE], 0.0, tl.float32)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    for step in range(0, tiles):
        start = step * TILE
        cols = start + tl.arange(0, TILE)
        k = load_tile(k_ptr, start, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr, start, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        score = biased(score, rows, cols, mask_ptr, pair_ptr, seq, pair_row, MASKED, PAIRED, RAGGED, False)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2((score - base[:, None]) * LOG2E)
        shrink = tl.exp2((top - base) * LOG2E)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)) / LOG2E)
    out_ptr += (alignment * seq * heads + head) * DIM
    store_tile(out_ptr, first, seq, heads * DIM, out, TILE, DIM, DIM_BLOCK, RAGGED)
    if RAGGED:
        tl.store(lse_ptr + rows, lse, mask=rows < seq)
    else:
        tl.store(lse_ptr + rows, lse)
"""
)

BACKWARD_Q = (
    BIASED
    + LOGARITHMS
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, mask_ptr, pair_ptr, dq_ptr, delta_ptr,
"""
    + _GRAD_STRIDES
    + _CONSTANTS
    + _PROGRAM
    + """    grad_ptr += sample * grad_batch + sequence * grad_sequence + head * GRAD_HEAD
    out_ptr += (alignment * seq * heads + head) * DIM
    lse_ptr += (alignment * heads + head) * seq
    delta_ptr += (alignment * heads + head) * seq
    rows = first + tl.arange(0, TILE)
    lse = load_lse(lse_ptr, rows, seq, RAGGED)
    out = load_tile(out_ptr, first, seq, heads * DIM, TILE, DIM, DIM_BLOCK, RAGGED)
    grad = load_tile(grad_ptr, first, seq, GRAD_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if RAGGED:
        tl.store(delta_ptr + rows, delta, mask=rows < seq)
    else:
        tl.store(delta_ptr + rows, delta)
    q = load_tile(q_ptr, first, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    acc = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    for step in range(0, tiles):
        start = step * TILE
        cols = start + tl.arange(0, TILE)
        k = load_tile(k_ptr, start, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr, start, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
        score = biased(score, rows, cols, mask_ptr, pair_ptr, seq, pair_row, MASKED, PAIRED, RAGGED, False)
        weight = tl.exp2((score - lse[:, None]) * LOG2E)
        inner = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        slope = weight * (inner - delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION)
    dq_ptr += (alignment * seq * heads + head) * DIM
    store_tile(dq_ptr, first, seq, heads * DIM, acc * SCALE, TILE, DIM, DIM_BLOCK, RAGGED)
"""
)

BACKWARD_KV = (
    BIASED
    + LOGARITHMS
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, mask_ptr, pair_ptr, dk_ptr, dv_ptr, dmask_ptr,
"""
    + _GRAD_STRIDES
    + _CONSTANTS
    + _PROGRAM
    + """    grad_ptr += sample * grad_batch + sequence * grad_sequence + head * GRAD_HEAD
    lse_ptr += (alignment * heads + head) * seq
    delta_ptr += (alignment * heads + head) * seq
    dmask_ptr += (alignment * heads + head) * seq
    cols = first + tl.arange(0, TILE)
    k = load_tile(k_ptr, first, seq, K_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    v = load_tile(v_ptr, first, seq, V_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
    dk = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    dv = tl.full([TILE, DIM_BLOCK], 0.0, tl.float32)
    dmask = tl.full([TILE], 0.0, tl.float32)
    for step in range(0, tl.cdiv(seq, STEP)):
        start = step * STEP
        rows = start + tl.arange(0, STEP)
        q = load_tile(q_ptr, start, seq, Q_ROW, STEP, DIM, DIM_BLOCK, RAGGED)
        grad = load_tile(grad_ptr, start, seq, GRAD_ROW, STEP, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE
        score = biased(score, rows, cols, mask_ptr, pair_ptr, seq, pair_row, MASKED, PAIRED, RAGGED, True)
        lse = load_lse(lse_ptr, rows, seq, RAGGED)
        weight = tl.exp2((score - lse[None, :]) * LOG2E)
        dv = tl.dot(weight.to(grad.dtype), grad, dv, input_precision=PRECISION)
        inner = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        delta = load_rows(delta_ptr, rows, seq, 0.0, RAGGED)
        slope = weight * (inner - delta[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk, input_precision=PRECISION)
        if MASK_GRAD:
            dmask += tl.sum(slope, axis=1)
    dk_ptr += (alignment * seq * heads + head) * DIM
    dv_ptr += (alignment * seq * heads + head) * DIM
    store_tile(dk_ptr, first, seq, heads * DIM, dk * SCALE, TILE, DIM, DIM_BLOCK, RAGGED)
    store_tile(dv_ptr, first, seq, heads * DIM, dv, TILE, DIM, DIM_BLOCK, RAGGED)
    if MASK_GRAD:
        if RAGGED:
            tl.store(dmask_ptr + cols, dmask, mask=cols < seq)
        else:
            tl.store(dmask_ptr + cols, dmask)
"""
)

BACKWARD_PAIR = (
    BIASED
    + LOGARITHMS
    + """

@triton.jit
def {name}(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, mask_ptr, pair_ptr, dpair_ptr, shares,
"""
    + _GRAD_STRIDES
    + _CONSTANTS
    + """    first = tl.program_id(0) % tiles * TILE
    steps = tl.cdiv(seq, STEP)
    start = tl.program_id(0) // tiles % steps * STEP
    rest = tl.program_id(0) // tiles // steps
    share = rest % shares
    head = (rest // shares % heads).to(tl.int64)
    sample = (rest // shares // heads).to(tl.int64)
    q_ptr += sample * q_batch + head * Q_HEAD
    k_ptr += sample * k_batch + head * K_HEAD
    v_ptr += sample * v_batch + head * V_HEAD
    grad_ptr += sample * grad_batch + head * GRAD_HEAD
    mask_ptr += sample * mask_batch
    pair_ptr += sample * pair_batch + head * pair_head
    rows = first + tl.arange(0, TILE)
    cols = start + tl.arange(0, STEP)
    pair = tl.full([TILE, STEP], 0.0, tl.float32)
    pair = biased(pair, rows, cols, mask_ptr, pair_ptr, seq, pair_row, False, PAIRED, RAGGED, False)
    acc = tl.full([TILE, STEP], 0.0, tl.float32)
    for index in range(sequences * share // shares, sequences * (share + 1) // shares):
        sequence = tl.cast(index, tl.int64)
        known = ((sample * sequences + sequence) * heads + head) * seq
        q = load_tile(q_ptr + sequence * q_sequence, first, seq, Q_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        k = load_tile(k_ptr + sequence * k_sequence, start, seq, K_ROW, STEP, DIM, DIM_BLOCK, RAGGED)
        v = load_tile(v_ptr + sequence * v_sequence, start, seq, V_ROW, STEP, DIM, DIM_BLOCK, RAGGED)
        grad = load_tile(grad_ptr + sequence * grad_sequence, first, seq, GRAD_ROW, TILE, DIM, DIM_BLOCK, RAGGED)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE + pair
        mask = mask_ptr + sequence * mask_sequence
        score = biased(score, rows, cols, mask, pair_ptr, seq, pair_row, MASKED, False, False, False)
        lse = load_lse(lse_ptr + known, rows, seq, RAGGED)
        weight = tl.exp2((score - lse[:, None]) * LOG2E)
        inner = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        delta = load_rows(delta_ptr + known, rows, seq, 0.0, RAGGED)
        acc += weight * (inner - delta[:, None])
    batch = tl.num_programs(0) // (tiles * steps * shares * heads)
    dpair_ptr += ((share.to(tl.int64) * batch + sample) * heads + head) * seq * seq
    where = dpair_ptr + rows[:, None].to(tl.int64) * seq + cols[None, :]
    acc = acc.to(dpair_ptr.dtype.element_ty)
    if RAGGED:
        tl.store(where, acc, mask=(rows < seq)[:, None] & (cols < seq)[None, :])
    else:
        tl.store(where, acc)
"""
)
