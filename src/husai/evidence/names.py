"""Names of scores and nulls."""

from __future__ import annotations

GAP = "mcc_gap_bound"
ALIVE = ("pwmcc_alive", "mcc_alive", "mcc_alive_abs", "share70_alive")
OTHERS = ("mcc_others", "mcc_others_abs", "share70_others")
"""Scores of alive features that are like no prototype."""
SCORES = ("pwmcc", "mcc", "share70", *ALIVE)
PAIRED = ("mcc_alive", "share70_alive")
"""Scores of one matching. They suffice for a control that many studies share."""
ACROSS = ("mcc_alive", "mcc_alive_abs", "share70_alive")
"""Scores of the candidate's SAEs against transcoders, by signed and absolute cosines."""
SCORED = (PAIRED, ACROSS, ALIVE, (*ALIVE, *OTHERS), SCORES, (*SCORES, *OTHERS))
"""Sets of scores that a study may hold."""
PRIMARY_SCORE = "mcc_alive"
GATED_NULLS = ("isotropic", "spectral", "gaussian")
COMPARED_NULLS = ("isotropic", "spectral")
"""Nulls of phases that compare arms, because these phases train no control for each arm."""
ASKED_FOR_NULLS = ("untrained", "random_model")
"""Optional nulls: they are reported if they were computed."""
NEAR = 0.7
"""Smallest signed cosine with a prototype that makes a feature prototype-like."""
STRATA = {"firing_rate": (0.0, 1e-3, 1e-2, 1e-1, 1.0), "nearest": (-1.0, 0.3, 0.5, NEAR, 1.0)}
"""Figure of a feature -> edges of the strata by which matches are reported. A stratum includes its lower edge. Figures:
the share of held-out rows on which a feature fires, and its signed cosine with the nearest prototype."""
