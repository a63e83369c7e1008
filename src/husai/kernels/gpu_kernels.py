"""The sparse parts of a training step as Triton kernels. One program works on one row, or on one feature.

Kept entries are as in `sparse.py`: entries of row r are at `offsets[r] : offsets[r + 1]`. Weights are feature-major.
Rows and features are numbered over the whole stack, and kernels find the member by division.
"""

import triton
import triton.language as tl


@triton.jit
def residual(
    offsets, features, values, W, bias, target, error, slopes, squares, rows, d_sae, d_in, target_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """error = target − bias − Σ values · W[features] of one row, its squared norm, and slopes = W[features] · error."""
    row = tl.program_id(0).to(tl.int64)
    member = row // rows
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    goal = tl.load(target + member * target_stride + (row % rows) * d_in + columns, mask=inside, other=0.0)
    total = goal - tl.load(bias + member * d_in + columns, mask=inside, other=0.0)
    low, high = tl.load(offsets + row), tl.load(offsets + row + 1)
    member_W = W + member * d_sae * d_in
    for e in range(low, high):
        feature = tl.load(features + e).to(tl.int64)
        total -= tl.load(values + e) * tl.load(member_W + feature * d_in + columns, mask=inside, other=0.0)
    tl.store(error + row * d_in + columns, total, mask=inside)
    tl.store(squares + row, tl.sum(total * total, 0))
    for e in range(low, high):
        feature = tl.load(features + e).to(tl.int64)
        tl.store(slopes + e, tl.sum(total * tl.load(member_W + feature * d_in + columns, mask=inside, other=0.0), 0))


@triton.jit
def gather_dots(features, W, bias, x, out, entries, rows, d_sae, d_in, x_stride, BLOCK: tl.constexpr):
    """out[row, e] = W[features[row, e]] · x[row] + bias[features[row, e]] for the `entries` of one row."""
    row = tl.program_id(0).to(tl.int64)
    member = row // rows
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    row_of_x = tl.load(x + member * x_stride + (row % rows) * d_in + columns, mask=inside, other=0.0)
    for e in range(0, entries):
        feature = tl.load(features + row * entries + e) + member * d_sae
        w = tl.load(W + feature * d_in + columns, mask=inside, other=0.0)
        tl.store(out + row * entries + e, tl.sum(w * row_of_x, 0) + tl.load(bias + feature))


@triton.jit
def weighted_sums(
    starts, rows_of, order, weights, x, centre, sums, totals, rows, d_sae, d_in, x_stride, BLOCK: tl.constexpr
):
    """Sums over the entries of one feature: Σ weights, and Σ weights · (x − centre)."""
    feature = tl.program_id(0).to(tl.int64)
    member = feature // d_sae
    columns = tl.arange(0, BLOCK)
    inside = columns < d_in
    middle = tl.load(centre + member * d_in + columns, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), dtype=middle.dtype)
    weight_sum = tl.sum(total, 0)
    for i in range(tl.load(starts + feature), tl.load(starts + feature + 1)):
        entry = tl.load(order + i)
        weight = tl.load(weights + entry)
        row = tl.load(rows_of + entry) % rows
        part = tl.load(x + member * x_stride + row * d_in + columns, mask=inside, other=0.0)
        total += weight * part
        weight_sum += weight
    tl.store(sums + feature * d_in + columns, total - weight_sum * middle, mask=inside)
    tl.store(totals + feature, weight_sum)


@triton.jit
def adam(p, g, m, v, rate, corrections, decay, beta1, beta2, rows, d, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Step of one row of `p`. With UNIT, the gradient's part along the row is removed, and the row keeps norm 1."""
    row = tl.program_id(0).to(tl.int64)
    own_rate = tl.load(rate + row // rows)
    first, second = tl.load(corrections), tl.load(corrections + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    at = row * d + columns
    w = tl.load(p + at, mask=inside, other=0.0)
    dw = tl.load(g + at, mask=inside, other=0.0)
    if UNIT:
        dw -= tl.sum(w * dw, 0) * w
    m1 = tl.load(m + at, mask=inside, other=0.0)
    m2 = tl.load(v + at, mask=inside, other=0.0)
    m1 += (1 - beta1) * (dw - m1)
    m2 = beta2 * m2 + (1 - beta2) * dw * dw
    w = w * (1 - own_rate * decay) - own_rate * (m1 / first) / (tl.sqrt(m2 / second) + 1e-8)
    if UNIT:
        w = w / tl.sqrt(tl.sum(w * w, 0))
    tl.store(m + at, m1, mask=inside)
    tl.store(v + at, m2, mask=inside)
    tl.store(p + at, w, mask=inside)
