"""Names of scores and nulls."""

from __future__ import annotations

GAP = "mcc_gap_bound"
ALIVE = ("pwmcc_alive", "mcc_alive", "mcc_alive_abs", "share70_alive")
OTHERS = ("mcc_others", "mcc_others_abs", "share70_others")
"""Of alive features that are like no prototype."""
SCORES = ("pwmcc", "mcc", "share70", *ALIVE)
PAIRED = ("mcc_alive", "share70_alive")
"""Of one matching: what a control of many studies needs."""
SCORED = (PAIRED, ALIVE, (*ALIVE, *OTHERS), SCORES, (*SCORES, *OTHERS))
"""The scores that a study may hold."""
PRIMARY_SCORE = "mcc_alive"
GATED_NULLS = ("isotropic", "spectral", "gaussian")
COMPARED_NULLS = ("isotropic", "spectral")
"""Nulls of phases that compare arms, and train no control for each."""
ASKED_FOR_NULLS = ("untrained", "random_model")
"""Reported where they were computed, and not missed where they were not."""
