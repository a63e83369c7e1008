"""Registered thresholds and seeds. `rules` compares with them, and flags have them as defaults. Imports nothing heavy.

docs/methods.md stated them before the runs that they judge.
"""

from __future__ import annotations

from collections.abc import Iterable

from husai.runs.files import digest

K = 5
"""Number of features of a probe at which differences are taken."""
SPECTRAL_DRAWS = 100
MIN_STABILITY_EXCESS = 0.02
"""Smallest excess over each control, of `mcc` and of the share of features matched at 0.7 or more. It is also the
smallest excess of `mcc` between the candidate's SAEs and transcoders."""
MIN_CODE_GAIN = 0.01
"""Smallest gain of explained variance and of CE recovered over the best kind of dictionary of prototypes."""
MIN_RECOVERY = 0.8
"""Smallest lower end of the recovery of planted features. Fixed on pilots with other data seeds (docs/methods.md)."""
RANDOM_DRAWS = (0, 1, 2)
"""Seeds of the draws of the random weights. Fixed, so that nobody can pick the draws with the best result."""


def random_weights(seed: int) -> str:
    """Name of a draw of the random weights."""
    return f"random_weights(seed={seed})"


def random_subject(subject_digest: str, seed: int) -> str:
    """Digest of the random-weights control of a subject."""
    return digest([subject_digest, random_weights(seed)])


MAX_OOD_DROP = 0.1
MIN_SAEBENCH_DELTA = 0.0
MIN_CEBENCH_DELTA = 0.0
MIN_EXPLAINED_VARIANCE, MIN_CE_RECOVERED = 0.5, 0.5
"""Floors. Below that of explained variance, SAEs of planted features have a recovery below one half.
That of CE recovered is a convention."""
MAX_DEAD_SHARE = 0.25
"""Ceiling. SAEs twice as wide as a planted dictionary, trained until they recover it, have fewer dead features."""
MAX_EV_LOST = 0.05
"""Held-out explained variance that a pull towards a reference may cost."""
ALPHA = 0.05
"""Two-sided error probability. Intervals have level 1 − ALPHA."""
CONFIRMATION_SEEDS = 5
"""Default number of fresh seeds that a selection fixes for its confirmation."""
LARGEST_SCORE = 1.0
"""Upper bound of a normalised score of CE-Bench."""


def level_of_attempt(attempt: int, alpha: float = ALPHA) -> float:
    """Level of the intervals in a configuration's j-th confirmation, j = 1, 2, …: 1 − α/2ʲ.

    The error probabilities of all attempts add up to at most α.
    """
    return 1 - alpha * 0.5**attempt


def within_reach(reference: float, minimum: float) -> bool:
    """True if a normalised score can exceed the reference's by the minimum."""
    return reference + minimum <= LARGEST_SCORE


PROBING_SEED = 42
"""Seed of splits, probes and drawn pairs. Fixed, so that nobody can pick the seed with the best result."""
FRESH_SEEDS = (2027, 2039, 2053, 2063, 2069, 2081, 2083, 2087, 2089, 2099, 2111, 2113, 2129, 2131, 2137, 2141, 2143)
"""Seeds of a confirmation, in this order. Fixed, so that nobody can pick the seed with the best result."""


def fresh_seeds(used: Iterable[int], n: int) -> list[int]:
    """The first n of FRESH_SEEDS that no study used."""
    return [seed for seed in FRESH_SEEDS if seed not in set(used)][:n]


OUTLIER_NORM = 10.0
"""A row of activations is an outlier if its norm exceeds this multiple of the median norm: an attention sink."""
SHRUNK_NORM = 3.0
"""Multiple of the median norm that outliers are brought down to in training."""
RECURS_COSINE, RECURS_CORRELATION = 0.7, 0.5
"""Least signed decoder cosine, and least held-out correlation of activations, with the one-to-one partner."""
CERTIFIED_AT = 0.5
"""Share π of trainings in which a certified feature recurs, by its one-sided 95 % Clopper–Pearson bound."""
