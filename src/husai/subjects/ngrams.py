"""Interpolated Witten–Bell n-grams: what a language model must beat.

    P(w | h) = (c(h, w) + T(h) P(w | h′)) / (c(h) + T(h))

with c(h, w) how often w followed the context h, c(h) the sum over w, T(h) the number of different w, and h′ the context
without its oldest token. Below the unigram lies the uniform distribution. Witten & Bell, IEEE Trans. Inf. Theory 37(4),
1991; the interpolated form of Chen & Goodman, "An empirical study of smoothing techniques", 1998, section 2.5.
"""

from __future__ import annotations

import numpy as np


class WittenBell:
    """An n-gram model of documents, each a row of token numbers that ends with its own end token.

    Args:
        order: 1 (unigram), 2 (bigram), 3 (trigram).
        vocabulary: number of tokens; `vocabulary ** order` must fit into 63 bits.
        start: token that stands before a document.
    """

    def __init__(self, order: int, vocabulary: int, start: int = 0):
        self.order, self.vocabulary, self.start = order, vocabulary, start
        self.grams: list[tuple[np.ndarray, np.ndarray]] = []  # for n = 1 …: sorted codes, counts
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # sorted codes, c(h), T(h)

    def _codes(self, documents: list[np.ndarray], n: int) -> np.ndarray:
        """Number of each n-gram, `[tokens]`: the digits, oldest first, in base `vocabulary`."""
        pad = np.full(n - 1, self.start, np.int64)
        parts = []
        for document in documents:
            padded = np.concatenate([pad, document])
            code = np.zeros(len(document), np.int64)
            for i in range(n):
                code = code * self.vocabulary + padded[i : i + len(document)]
            parts.append(code)
        return np.concatenate(parts)

    def fit(self, documents: list[np.ndarray]) -> WittenBell:
        """Count the n-grams of all orders up to `order`."""
        for n in range(1, self.order + 1):
            codes, counts = np.unique(self._codes(documents, n), return_counts=True)
            contexts, first = np.unique(codes // self.vocabulary, return_index=True)
            types = np.diff(np.append(first, len(codes)))
            self.grams.append((codes, counts))
            self.contexts.append((contexts, np.add.reduceat(counts, first), types))
        return self

    def probabilities(self, documents: list[np.ndarray]) -> np.ndarray:
        """P of each token of the documents, one after the other, `[tokens]`."""
        p = np.full(sum(map(len, documents)), 1 / self.vocabulary)
        for n in range(1, self.order + 1):
            codes = self._codes(documents, n)
            count = _look_up(*self.grams[n - 1], codes)
            contexts, totals, types = self.contexts[n - 1]
            total = _look_up(contexts, totals, codes // self.vocabulary)
            kinds = _look_up(contexts, types, codes // self.vocabulary)
            seen = total > 0
            p[seen] = (count[seen] + kinds[seen] * p[seen]) / (total[seen] + kinds[seen])
        return p

    def bits(self, documents: list[np.ndarray]) -> np.ndarray:
        """−log2 P of each token, `[tokens]`."""
        return -np.log2(self.probabilities(documents))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value beside each wanted key, 0 where it is not among the sorted `keys`."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
