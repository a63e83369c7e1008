"""Names of scores and nulls."""

from __future__ import annotations

GAP = "mcc_gap_bound"
ALIVE = ("pwmcc_alive", "mcc_alive", "share70_alive")
SCORES = ("pwmcc", "mcc", "share70", *ALIVE)
PRIMARY_SCORE = "mcc_alive"
GATED_NULLS = ("isotropic", "untrained", "spectral")
REPORTED_NULLS = ("covariance_matched", "shuffled")
ASKED_FOR_NULLS = ("random_model",)
"""Reported where they were computed, and not missed where they were not."""
