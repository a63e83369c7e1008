"""Implementation of `sparse.py` on a CPU: numba kernels (`cpu_kernels.py`), distributed over threads in pieces."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from husai.kernels import cpu_kernels as kernels
from husai.kernels.sparse import Choice, Kept
from husai.kernels.workers import deal, spans

ROWS = 512
"""Number of rows of a piece. Its pre-activations stay in cache between the product and the choice."""
FEATURES = 256
"""Number of features of a piece."""
TILE_BYTES = 2**20
"""Bytes of a tile of gathered rows: half of a core's private cache."""
SLACK = 1.05  # on the bound of a proposal's error: sums in float32 are not exact either


def select(x: Tensor, W: Tensor, bias: Tensor, choice: Choice) -> Kept:
    """The entries of x Wᵀ + bias to keep. `x [n, rows, d_in]`, `W [n, d_sae, d_in]`, `bias [n, d_sae]`."""
    n, rows, d_sae = len(x), x.shape[1], W.shape[1]
    if choice.across_batch:
        return _across_batch(x, W, bias, choice)
    sizes = [min(k, d_sae) for k in choice.k]
    features = [torch.empty(rows, size, dtype=torch.int32) for size in sizes]
    values = [x.new_empty(rows, size) for size in sizes]
    counts = torch.zeros(n, rows, dtype=torch.long)
    propose = choice.propose and x.dtype == torch.float32
    if propose:
        x_rounded = [Rounded(x[0])] * n if x.stride(0) == 0 else [Rounded(x[i]) for i in range(n)]
        W_rounded = [Rounded(w) for w in W]

    def share(i: int, first: int, last: int) -> None:
        out = [t[i][first:last].numpy() for t in (features, values, counts)]
        if not propose:
            pre = torch.addmm(bias[i], x[i, first:last], W[i].T)
            kernels.top_k(pre.numpy(), sizes[i], *out)
            return
        a, b = x_rounded[i], W_rounded[i]
        product = torch.addmm(bias[i].bfloat16(), a.bits[first:last], b.bits.T).view(torch.int16).numpy()
        error = a.errors[first:last] * b.largest_norm + a.norms[first:last] * b.largest_error
        at = torch.empty(last - first + 1, dtype=torch.long).numpy()
        proposals = torch.empty(product.size + 1, dtype=torch.int32).numpy()
        kernels.propose(product, (error * SLACK).numpy(), bias[i].abs().max().numpy()[()], sizes[i], at, proposals)
        scores = torch.empty(int(at[-1])).numpy()
        kernels.gather_dots(at, proposals, W[i].numpy(), bias[i].numpy(), x[i, first:last].numpy(), scores)
        kernels.keep_top(at, proposals, scores, sizes[i], *out)

    deal(share, ((i, *span) for i in range(n) for span in spans(rows, ROWS)))
    return _packed(rows, d_sae, features, values, counts)


def _packed(rows: int, d_sae: int, features: list[Tensor], values: list[Tensor], counts: Tensor) -> Kept:
    """The kept entries without gaps, from rows `[rows, k]` whose first `counts [n, rows]` entries are filled."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.flatten().cumsum(0)])
    sizes = tuple(counts.sum(1).tolist())
    chosen = torch.empty(sum(sizes), dtype=torch.int32)
    kept = values[0].new_empty(sum(sizes))
    starts = offsets[:-1].view_as(counts)

    def share(i: int) -> None:
        out = starts[i].numpy(), chosen.numpy(), kept.numpy()
        kernels.pack(counts[i].numpy(), features[i].numpy(), values[i].numpy(), *out)

    deal(share, ((i,) for i in range(len(counts))))
    return Kept(rows, d_sae, sizes, offsets, chosen, kept)


class Rounded:
    """A float32 matrix rounded to bfloat16, with the norms and rounding errors of its rows."""

    def __init__(self, x: Tensor):
        self.bits = torch.empty(x.shape, dtype=torch.bfloat16)
        self.norms, self.errors = torch.empty(len(x)), torch.empty(len(x))
        bits, norms, errors = self.bits.view(torch.uint16).numpy(), self.norms.numpy(), self.errors.numpy()
        source = x.contiguous().numpy()

        def share(first: int, last: int) -> None:
            kernels.round_rows(source[first:last], bits[first:last], norms[first:last], errors[first:last])

        deal(share, spans(len(x), 1024))
        self.largest_error = float(self.errors.max())
        self.largest_norm = float(self.norms.max()) + self.largest_error


def _across_batch(x: Tensor, W: Tensor, bias: Tensor, choice: Choice) -> Kept:
    """BatchTopK. Values equal to the smallest kept one are all kept."""
    n, rows, d_sae = len(x), x.shape[1], W.shape[1]
    integers, shift = (torch.int32, 16) if x.dtype == torch.float32 else (torch.int64, 48)
    pieces = list(spans(rows, ROWS))
    counts, features, values = [], [], []
    for i in range(n):
        pre = x.new_empty(rows, d_sae)
        histograms = torch.zeros(len(pieces), 2**15, dtype=torch.long)

        def multiply(j: int, first: int, last: int, i=i, pre=pre, histograms=histograms) -> None:
            torch.addmm(bias[i], x[i, first:last], W[i].T, out=pre[first:last])
            kernels.histogram(pre[first:last].view(integers).numpy(), shift, histograms[j].numpy())

        deal(multiply, ((j, *piece) for j, piece in enumerate(pieces)))
        threshold = _kth_positive(pre, choice.k[i] * rows, histograms.sum(0), integers, shift)
        count = torch.empty(rows, dtype=torch.long)
        deal(kernels.count_rows, ((pre[a:b].numpy(), threshold, count[a:b].numpy()) for a, b in pieces))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
        chosen, kept = torch.empty(int(offsets[-1]), dtype=torch.int32), x.new_empty(int(offsets[-1]))
        deal(
            kernels.collect,
            (
                (pre[a:b].numpy(), threshold, offsets[a : b + 1].numpy(), chosen.numpy(), kept.numpy())
                for a, b in pieces
            ),
        )
        counts.append(count)
        features.append(chosen)
        values.append(kept)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)])
    return Kept(rows, d_sae, tuple(map(len, values)), offsets, torch.cat(features), torch.cat(values))


def _kth_positive(pre: Tensor, k: int, histogram: Tensor, integers: torch.dtype, shift: int):
    """The k-th largest positive value of `pre`, or the smallest positive number if there are fewer."""
    from_above = histogram.flip(0).cumsum(0)
    tiny = torch.finfo(pre.dtype).tiny
    if int(from_above[-1]) <= k:
        return pre.new_tensor(tiny).numpy()[()]
    leading = len(histogram) - 1 - int((from_above < k).sum())
    above = int(from_above[len(histogram) - 1 - leading]) - int(histogram[leading])
    same = pre[(pre.view(integers) >> shift) == leading]
    return same.topk(k - above).values[-1].numpy()[()]


def residual(kept: Kept, values: Tensor, W: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(error = target − bias − Σ values · W `[n, rows, d_in]`, each entry's W[feature] · error, each row's ‖error‖²)"""
    error = torch.empty(kept.n, kept.rows, W.shape[2], dtype=W.dtype)
    slopes, squares = torch.empty_like(values), values.new_empty(kept.n, kept.rows)
    offsets, features, values = kept.offsets.numpy(), kept.features.numpy(), values.detach().numpy()
    W, bias, out = W.detach().numpy(), bias.detach().numpy(), slopes.numpy()

    def share(i: int, first: int, last: int) -> None:
        rows = offsets[i * kept.rows : (i + 1) * kept.rows + 1]
        goal, e, s = target[i].detach().numpy(), error[i].numpy(), squares[i].numpy()
        kernels.residual(rows, features, values, W[i], bias[i], goal, first, last, e, out, s)

    deal(share, ((i, *span) for i in range(kept.n) for span in spans(kept.rows, ROWS)))
    return error, slopes, squares.flatten()


def weighted_sums(kept: Kept, weights: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """For each feature over its entries: (Σ weights · (x − centre) `[n, d_sae, d_in]`, Σ weights `[n, d_sae]`)"""
    starts, rows, entries = _by_feature(kept)
    sums, totals = weights.new_empty(kept.n, kept.d_sae, x.shape[2]), weights.new_empty(kept.n, kept.d_sae)
    weights, centre = weights.detach().numpy(), centre.detach().numpy()

    def share(i: int, first: int, last: int) -> None:
        source, out, total = x[i].detach().numpy(), sums[i].numpy(), totals[i].numpy()
        tile = _tile(source, len(entries[i]) / kept.d_sae)
        kernels.weighted_sums(starts[i], rows[i], entries[i], weights, source, centre[i], first, last, tile, out, total)

    deal(share, ((i, *span) for i in range(kept.n) for span in spans(kept.d_sae, FEATURES)))
    return sums, totals


def _tile(x: np.ndarray, entries: float) -> int:
    """Number of rows of `x` that fit into cache; all rows if a feature has few of its `entries` among them."""
    tile = max(1, TILE_BYTES // x[0].nbytes)
    return tile if entries * tile / len(x) >= 4 else len(x)


def activity(kept: Kept) -> tuple[Tensor, Tensor]:
    """(bool [n, d_sae], which features are active on any row; [n], how many entries are positive)"""
    starts = torch.stack([torch.from_numpy(s) for s in _by_feature(kept)[0]])
    return starts.diff() > 0, starts[:, -1].clone()


def _by_feature(kept: Kept) -> tuple[list, list, list]:
    """(starts, rows, entries) of `kernels.by_feature`, each a list over members. They are computed once."""
    if kept.order is not None:
        return kept.order
    offsets, features = kept.offsets.numpy(), kept.features.numpy()
    order: tuple[list, list, list] = ([], [], [])
    kept.order = order
    for i in range(kept.n):
        first, last = (int(offsets[j * kept.rows]) for j in (i, i + 1))
        order[0].append(torch.empty(kept.d_sae + 1, dtype=torch.long).numpy())
        order[1].append(torch.empty(last - first, dtype=torch.int32).numpy())
        order[2].append(torch.empty(last - first, dtype=torch.int64).numpy())

    def share(i: int) -> None:
        rows = offsets[i * kept.rows : (i + 1) * kept.rows + 1]
        kernels.by_feature(rows, features, *(part[i] for part in order))

    deal(share, ((i,) for i in range(kept.n)))
    return order


def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rate: Tensor,
    decay: float,
    betas: tuple,
    corrections: Tensor,
    unit: bool,
) -> None:
    """As `dense.adam`, for parameters whose rows are contiguous."""
    shape = (len(p), -1, p.shape[-1]) if p.ndim > 2 else (len(p), 1, p.shape[-1])
    arrays = [t.detach().view(shape).numpy() for t in (p, g, m, v)]
    number = arrays[0].dtype.type
    rates = rate.tolist()
    constants = [number(c) for c in (*betas, *corrections.tolist())]

    def share(i: int, first: int, last: int) -> None:
        rows_of_member = [a[i] for a in arrays]
        kernels.adam_rows(
            *rows_of_member, first, last, number(rates[i]), number(1 - rates[i] * decay), *constants, unit
        )

    deal(share, ((i, *span) for i in range(shape[0]) for span in spans(arrays[0].shape[1], FEATURES)))
