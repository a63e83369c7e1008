"""Registered levels: `rules` compares with them, flags show them as their defaults. Imports nothing.

docs/methods.md states them before the runs that they judge.
"""

from __future__ import annotations

K = 5
"""Number of features of a probe at which differences are taken."""
SPECTRAL_DRAWS = 100
MIN_TRANSCODER_GAIN = 0.0
MAX_OOD_DROP = 0.1
MIN_SAEBENCH_DELTA = 0.0
MIN_CEBENCH_DELTA = 0.0
MAX_EV_LOST = 0.05
"""Held-out explained variance that a pull towards a reference may cost."""
ALPHA = 0.05
"""Two-sided; intervals are of level 1 − ALPHA."""
LARGEST_SCORE = 1.0
"""Upper bound of a normalised score of CE-Bench."""


def within_reach(reference: float, minimum: float) -> bool:
    """Whether an SAE can lie a minimum above a reference's normalised score."""
    return reference + minimum <= LARGEST_SCORE
