"""The sparse parts of a training step as numba kernels, for float32 and float64.

Each kernel does one thread's share of the work and releases the interpreter's lock. `cpu.py` distributes the shares.
Results do not depend on the number of shares: a kernel gives the same bytes with any number of threads.

Kept entries are ordered by row: entries of row r are at `offsets[r] : offsets[r + 1]` of `features` and `values`.
Weights are feature-major: `W [d_sae, d_in]` for encoder and decoder.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Reassociation lets the compiler use vector registers for sums; the order of summation is still fixed. "nnan" allows
# the same for maxima. If training diverges, the kept entries are arbitrary, and the loss shows the divergence.
FAST = {"reassoc", "nsz", "nnan", "contract", "arcp"}
kernel = njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
# A kernel that counts and a kernel that fills must make equal comparisons, even of NaN.
strict_kernel = njit(nogil=True, cache=True, error_model="numpy")


@kernel
def count_at_least(values, count, threshold):
    n = 0
    for i in range(count):
        n += values[i] >= threshold
    return n


@kernel
def cut(values, count, k, steps):
    """A threshold that at least k of `values[:count]` reach, and few more. Branch-free bisection by counting."""
    low, high = values[0], values[0]
    for i in range(1, count):
        low, high = min(low, values[i]), max(high, values[i])
    for _ in range(steps):
        middle = low + (high - low) / 2
        n = count_at_least(values, count, middle)
        if n >= k:
            low = middle
            if n == k:
                break
        else:
            high = middle
    return low


@kernel
def kth_largest(values, count, k):
    """The k-th largest of `values[:count]` (1 ≤ k ≤ count)."""
    low = cut(values, count, k, 24)
    if count_at_least(values, count, low) > k:  # ties, or values closer than the resolution of the bisection
        return np.partition(values[:count], count - k)[count - k]
    smallest = values[0]
    first = True
    for i in range(count):
        if values[i] >= low and (first or values[i] < smallest):
            smallest = values[i]
            first = False
    return smallest


@kernel
def group_maxima(row, maxima):
    """`maxima[g]` = the largest of row[g], row[g + G], row[g + 2G], …: whole vector registers at a time."""
    groups = len(maxima)
    maxima[:] = row[:groups]
    for start in range(groups, len(row), groups):
        part = row[start : start + groups]
        for g in range(len(part)):
            v, m = part[g], maxima[g]
            maxima[g] = v if v > m else m


@kernel
def at_least(row, maxima, threshold, chosen, columns):
    """Write the columns of `row` with values ≥ threshold into `columns`; returns their number. Skips low groups.

    Every entry is written, but counted only if it qualifies. This avoids branches that the processor mispredicts.
    """
    n, count, groups = 0, 0, len(maxima)
    for g in range(groups):
        chosen[n] = g
        n += maxima[g] >= threshold
    for i in range(n):
        for j in range(chosen[i], len(row), groups):
            columns[count] = j
            count += row[j] >= threshold
    return count


@kernel
def keep_largest(columns, scores, count, k, scratch, features, values):
    """Keep the k largest positive `scores[:count]` of `columns[:count]`; returns their number. Ties keep the order."""
    if count == 0:
        return 0
    threshold = scores[0]
    if count > k:
        scratch[:count] = scores[:count]
        threshold = kth_largest(scratch, count, k)
    else:
        for i in range(count):
            threshold = min(threshold, scores[i])
    above = 0
    for i in range(count):
        above += scores[i] > threshold
    ties, n = k - above, 0
    for i in range(count):
        if scores[i] > threshold or (scores[i] == threshold and ties > 0):
            ties -= scores[i] == threshold
            if scores[i] > 0 and n < k:  # n < k: never past the row's end, even for NaN of a diverged training
                features[n] = columns[i]
                values[n] = scores[i]
                n += 1
    return n


@kernel
def groups_for(k, width):
    """Enough groups that the k-th largest group maximum lies close below the k-th largest value."""
    groups = 64
    while groups < max(4 * k, width // 16):
        groups *= 2
    return min(groups, width)


@kernel
def top_k(pre, k, features, values, counts):
    """Row-wise exact top-k of the positive values. `pre [R, width]` -> the first counts[r] of `features`, `values`
    `[R, k]`.

    At least k values are as large as the k-th largest group maximum, so only values from there on can be kept.
    """
    rows, width = pre.shape
    maxima = np.empty(groups_for(k, width), pre.dtype)
    scratch = np.empty(width, pre.dtype)
    scores = np.empty(width, pre.dtype)
    columns = np.empty(width + 1, np.int32)
    chosen = np.empty(width + 1, np.int32)
    tiny = np.nextafter(pre.dtype.type(0), pre.dtype.type(1))
    for r in range(rows):
        row = pre[r]
        group_maxima(row, maxima)
        threshold = tiny
        if k < len(maxima):
            scratch[: len(maxima)] = maxima
            threshold = max(tiny, kth_largest(scratch, len(maxima), k))
        count = at_least(row, maxima, threshold, chosen, columns)
        for i in range(count):
            scores[i] = row[columns[i]]
        counts[r] = keep_largest(columns, scores, count, k, scratch, features[r], values[r])


@kernel
def propose(bits, error, largest_bias, k, offsets, features):
    """Propose features that may be among a row's k largest positive ones, by a bfloat16 product. Those of row r are at
    `offsets[r] : offsets[r + 1]` of `features`.

    With x̂, ŵ the rounded operands, |x·w − x̂·ŵ| ≤ ‖x − x̂‖‖w‖ + ‖x̂‖‖w − ŵ‖ =: δ (Cauchy–Schwarz; the norms are those of
    the actual rounding errors). Rounding the bias and the sum v adds at most 2⁻⁸(|v| + max|bias|). So a feature whose v
    lies more than 2δ + 2⁻⁷(v_k + max|bias|) below the k-th largest, v_k, is not among the k largest, and the kept set
    that `keep_top` makes of the proposals is that of the exact product.

    Bits of positive bfloat16 numbers are ordered as the numbers are, and those of negative ones, as int16, lie below
    them: nothing needs to be converted to compare.

    Args:
        bits: `[R, width]` int16, bfloat16 of x̂ Ŵᵀ + bias. error: `[R]`, δ.
    """
    rows, width = bits.shape
    maxima = np.empty(groups_for(k, width), np.int16)
    scratch = np.empty(width, np.float32)
    columns = np.empty(width + 1, np.int32)
    chosen = np.empty(width + 1, np.int32)
    word = np.empty(1, np.int32)
    number = word.view(np.float32)
    offsets[0] = 0
    for r in range(rows):
        row = bits[r]
        group_maxima(row, maxima)
        kth = np.float32(0)
        if k < len(maxima):
            as_float(maxima, len(maxima), scratch)
            kth = number[0] = max(np.float32(0), cut(scratch, len(maxima), k, 8))
            count = at_least(row, maxima, word[0] >> 16, chosen, columns)
            if count > k:
                for i in range(count):
                    word[0] = np.int32(row[columns[i]]) << 16
                    scratch[i] = number[0]
                kth = max(np.float32(0), cut(scratch, count, k, 8))  # below the k-th largest, if only a little
        number[0] = kth - 2 * error[r] - np.float32(2.0**-7) * (kth + largest_bias)
        if number[0] > 0:
            count = at_least(row, maxima, word[0] >> 16, chosen, features[offsets[r] :])
        else:  # there are hardly k positive values: all that may be positive
            lowest, count = number[0], 0
            for j in range(width):
                word[0] = np.int32(row[j]) << 16
                features[offsets[r] + count] = j
                count += number[0] >= lowest
        offsets[r + 1] = offsets[r] + count


@kernel
def as_float(bits, count, out):
    """bfloat16 bits (int16) to float32; negative numbers to 0."""
    raw = out.view(np.int32)
    for i in range(count):
        raw[i] = max(np.int32(bits[i]), 0) << 16  # type: ignore[operator]  # numpy's types are not read


@kernel
def keep_top(offsets, features, scores, k, kept_features, kept_values, counts):
    """The k largest positive `scores` of each row's proposals -> the first counts[r] of `kept_features`, `kept_values`
    `[R, k]`."""
    scratch = np.empty(len(scores), scores.dtype)
    for r in range(len(offsets) - 1):
        span = slice(offsets[r], offsets[r + 1])
        count = offsets[r + 1] - offsets[r]
        counts[r] = keep_largest(features[span], scores[span], count, k, scratch, kept_features[r], kept_values[r])


@kernel
def pack(counts, features, values, offsets, packed_features, packed_values):
    """The first counts[r] of each row `[R, k]`, one row after the other from `offsets[r]` on."""
    for r in range(len(counts)):
        for j in range(counts[r]):
            packed_features[offsets[r] + j] = features[r, j]
            packed_values[offsets[r] + j] = values[r, j]


@kernel
def gather_dots(offsets, features, W, bias, x, out):
    """out[e] = W[features[e]] · x[row of e] + bias[features[e]]."""
    for e in range(offsets[-1]):
        out[e] = bias[features[e]]
    for r in range(len(offsets) - 1):
        add_dots(W, features, offsets[r], offsets[r + 1], x[r], out)


@kernel
def add_dots(W, features, low, high, x, out):
    """out[e] += W[features[e]] · x for e = low … high − 1, four at a time, so that x is loaded once for four."""
    whole = high - (high - low) % 4
    for e in range(low, whole, 4):
        p, q, s, t = W[features[e]], W[features[e + 1]], W[features[e + 2]], W[features[e + 3]]
        a = b = c = d = W.dtype.type(0)
        for j in range(len(x)):
            v = x[j]
            a += p[j] * v
            b += q[j] * v
            c += s[j] * v
            d += t[j] * v
        out[e] += a
        out[e + 1] += b
        out[e + 2] += c
        out[e + 3] += d
    for e in range(whole, high):
        p = W[features[e]]
        a = W.dtype.type(0)
        for j in range(len(x)):
            a += p[j] * x[j]
        out[e] += a


@kernel
def add_rows(weights, W, chosen, low, high, out):
    """out += Σ weights[e] · W[chosen[e]] for e = low … high − 1, four at a time: `out` is loaded and stored less."""
    whole = high - (high - low) % 4
    for e in range(low, whole, 4):
        a, b, c, d = weights[e], weights[e + 1], weights[e + 2], weights[e + 3]
        p, q, s, t = W[chosen[e]], W[chosen[e + 1]], W[chosen[e + 2]], W[chosen[e + 3]]
        for j in range(len(out)):
            out[j] += a * p[j] + b * q[j] + c * s[j] + d * t[j]
    for e in range(whole, high):
        a, p = weights[e], W[chosen[e]]
        for j in range(len(out)):
            out[j] += a * p[j]


@kernel
def residual(offsets, features, values, W, bias, target, first, last, error, slopes, squares):
    """error = target − bias − Σ values · W[features] for rows first … last − 1, its squared norm into `squares`, and
    slopes[e] = W[features[e]] · error[row], while the row's part of W still lies in the cache."""
    slopes[offsets[first] : offsets[last]] = 0
    for r in range(first, last):
        low, high = offsets[r], offsets[r + 1]
        row, goal = error[r], target[r]
        for j in range(len(row)):
            row[j] = bias[j] - goal[j]
        add_rows(values, W, features, low, high, row)
        square = W.dtype.type(0)
        for j in range(len(row)):
            row[j] = -row[j]
            square += row[j] * row[j]
        squares[r] = square
        add_dots(W, features, low, high, row, slopes)


@kernel
def by_feature(offsets, features, starts, rows, entries):
    """Sort the entries by feature (counting sort): f's lie at `starts[f] : starts[f + 1]` of `rows` and `entries`."""
    starts[:] = 0
    for e in range(offsets[0], offsets[-1]):
        starts[features[e] + 1] += 1
    for f in range(len(starts) - 1):
        starts[f + 1] += starts[f]
    position = starts[:-1].copy()
    for r in range(len(offsets) - 1):
        for e in range(offsets[r], offsets[r + 1]):
            p = position[features[e]]
            position[features[e]] = p + 1
            rows[p] = r
            entries[p] = e


@kernel
def weighted_sums(starts, rows, entries, weights, x, centre, first, last, tile, sums, totals):
    """For features f = first … last − 1: totals[f] = Σ weights[e] over f's entries e, and
    sums[f] = Σ weights[e] · (x[row of e] − centre).

    `tile` rows of `x` at a time, so that they stay in cache while all these features add theirs up; a feature's entries
    lie in the order of their rows.
    """
    base = starts[first]
    weights_of_features, rows = weights[entries[base : starts[last]]], rows[base : starts[last]]
    for f in range(first, last):
        total = weights_of_features[starts[f] - base : starts[f + 1] - base].sum()
        out = sums[f]
        for j in range(len(out)):
            out[j] = -total * centre[j]
        totals[f] = total
    position = starts[first:last] - base
    for end in range(tile, len(x) + tile, tile):
        for f in range(first, last):
            low = high = position[f - first]
            while high < starts[f + 1] - base and rows[high] < end:
                high += 1
            add_rows(weights_of_features, x, rows, low, high, sums[f])
            position[f - first] = high


@kernel
def histogram(bits, shift, counts):
    """Counts of the positive numbers among `bits` (floats seen as signed integers), by their leading 16 bits."""
    for r in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            if bits[r, j] > 0:
                counts[bits[r, j] >> shift] += 1


@strict_kernel
def count_rows(pre, threshold, counts):
    """Number of values ≥ threshold in each row."""
    for r in range(pre.shape[0]):
        n = 0
        for j in range(pre.shape[1]):
            n += pre[r, j] >= threshold
        counts[r] = n


@strict_kernel
def collect(pre, threshold, offsets, features, values):
    """The values ≥ threshold of each row, from `offsets[r]` on, as many as `count_rows` counted."""
    for r in range(pre.shape[0]):
        e = offsets[r]
        for j in range(pre.shape[1]):
            if pre[r, j] >= threshold and e < offsets[r + 1]:
                features[e] = j
                values[e] = pre[r, j]
                e += 1


@kernel
def round_rows(x, bits, norms, errors):
    """bfloat16 of `x [R, d]` float32, to nearest, ties to even, as `bits` uint16; ‖x̂‖ and ‖x − x̂‖ a row."""
    raw = np.empty(x.shape[1], np.float32)
    word = raw.view(np.int32)
    for r in range(x.shape[0]):
        raw[:] = x[r]
        source, target = x[r], bits[r]
        for j in range(len(raw)):
            word[j] = (word[j] + 0x7FFF + ((word[j] >> 16) & 1)) & -0x10000
        for j in range(len(raw)):
            target[j] = np.uint16((word[j] >> 16) & 0xFFFF)
        square, error = np.float32(0), np.float32(0)
        for j in range(len(raw)):
            square += raw[j] * raw[j]
            error += (source[j] - raw[j]) * (source[j] - raw[j])
        norms[r] = np.sqrt(square)
        errors[r] = np.sqrt(error)


@kernel
def adam_rows(p, g, m, v, first, last, rate, decay, beta1, beta2, correction1, correction2, unit):
    """Adam on rows first … last − 1 of `p [R, d]`, in place.

    With `unit`, a row is a direction: the gradient's part along it is taken off and the row is scaled to norm 1 again.
    """
    one, tiny = p.dtype.type(1), p.dtype.type(1e-8)
    for r in range(first, last):
        w, dw, m1, m2 = p[r], g[r], m[r], v[r]
        along = p.dtype.type(0)
        if unit:
            for j in range(len(w)):
                along += w[j] * dw[j]
        square = p.dtype.type(0)
        for j in range(len(w)):
            d = dw[j] - along * w[j]
            m1[j] += (one - beta1) * (d - m1[j])
            m2[j] = beta2 * m2[j] + (one - beta2) * d * d
            new = w[j] * decay - rate * (m1[j] / correction1) / (np.sqrt(m2[j] / correction2) + tiny)
            w[j] = new
            square += new * new
        if unit:
            scale = one / np.sqrt(square)
            for j in range(len(w)):
                w[j] *= scale
