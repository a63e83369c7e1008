"""Interpolated Witten–Bell n-grams, the baseline that a language model must beat.

    P(w | h) = (c(h, w) + T(h) P(w | h′)) / (c(h) + T(h))

c(h, w) is the number of times that w followed the context h, c(h) its sum over w, T(h) the number of different w, and
h′ the context without its oldest token. The unigram backs off to the uniform distribution. Witten & Bell, IEEE Trans.
Inf. Theory 37(4), 1991; interpolated form of Chen & Goodman, "An empirical study of smoothing techniques", 1998,
section 2.5.
"""

from __future__ import annotations

import numpy as np


class WittenBell:
    """An n-gram model of documents. Each document is a row of token numbers that ends with an end token.

    Args:
        order: 1 (unigram), 2 (bigram), 3 (trigram).
        vocabulary: number of tokens; `vocabulary ** order` must fit into 63 bits.
        start: token before the first token of a document.
    """

    def __init__(self, order: int, vocabulary: int, start: int = 0):
        self.order, self.vocabulary, self.start = order, vocabulary, start
        self.grams: list[tuple[np.ndarray, np.ndarray]] = []  # for n = 1 …: sorted codes, counts
        self.contexts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # sorted codes, c(h), T(h)

    def _codes(self, documents: list[np.ndarray], n: int) -> np.ndarray:
        """Code of the n-gram that ends at each token, `[tokens]`: its tokens as digits in base `vocabulary`."""
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
        """Probability of each token of the concatenated documents, `[tokens]`."""
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


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Value of each query, or 0 if the sorted `keys` lack it."""
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)
