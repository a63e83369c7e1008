"""Logistic probes on activations of prompts, by sae-probes' own split and fit, with an interval for the AUC."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from husai.subjects import text
from husai.subjects.pretrained import quiet

LEVEL = 0.95


def delong(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(AUC, its standard error) from the scores of both classes.

    DeLong, DeLong & Clarke-Pearson, Biometrics 44(3), 1988. Each score has a share of the other class that it beats
    (ties count half). The standard error comes from the variances of this share over positives and over negatives.
    """
    beats = (positive[:, None] > negative[None]) + 0.5 * (positive[:, None] == negative[None])
    over_positive, over_negative = beats.mean(1).var(ddof=1), beats.mean(0).var(ddof=1)
    return float(beats.mean()), float(np.sqrt(over_positive / len(positive) + over_negative / len(negative)))


def auc_interval(auc: float, standard_error: float, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of an AUC, from the logit scale, which keeps them in [0, 1]. Without spread, the AUC itself."""
    if standard_error == 0 or not 0 < auc < 1:
        return auc, auc
    logit, spread = np.log(auc / (1 - auc)), standard_error / (auc * (1 - auc))
    z = stats.norm.ppf(0.5 + level / 2)
    low, high = 1 / (1 + np.exp(-(logit + np.array([-z, z]) * spread)))
    return float(low), float(high)


def probe(file: Path, data_set: str, seed: int = 42) -> dict:
    """Fit a logistic probe on one data set's activations as sae-probes does, and score it on its test rows.

    There are at most 1,024 training rows, balanced. C is chosen on a part of them. Test rows are balanced and unseen.

    Args:
        file: file with the tensor `[prompts, d_in]` that `harvest_prompts` wrote.

    Returns:
        {"data_set", "auc": {"estimate", "low", "high", "standard_error", "n_positive", "n_negative", "method"},
        "validation_auc", "accuracy", "n_train"}
    """
    with quiet():
        from sae_probes.utils_data import get_train_test_indices
        from sae_probes.utils_training import find_best_reg

    x = torch.load(file, weights_only=True).double().numpy()  # in float32 two runs of the solver can differ
    y = np.unique(text.table(data_set)["target"].to_numpy(), return_inverse=True)[1]
    n_train = min(len(y) - 100, 1024)
    train, test = get_train_test_indices(y, n_train, len(y) - n_train - 1, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = find_best_reg(x[train], y[train], x[test], y[test], seed=seed)
    scores, truth = fitted.classifier.predict_proba(x[test])[:, 1], y[test]
    auc, error = delong(scores[truth == 1], scores[truth == 0])
    low, high = auc_interval(auc, error)
    return {
        "data_set": data_set,
        "auc": {
            "estimate": auc,
            "low": low,
            "high": high,
            "standard_error": error,
            "n_positive": int((truth == 1).sum()),
            "n_negative": int((truth == 0).sum()),
            "method": f"DeLong, on the logit scale, {LEVEL:.0%}",
        },
        "validation_auc": fitted.metrics.val_auc,
        "accuracy": fitted.metrics.test_acc,
        "n_train": n_train,
    }
