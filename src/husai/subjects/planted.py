"""Generates rows from planted features by SAELens' `synthetic` generators: a subject with known features."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from husai.evidence.schemas import PlantedRows

NOISE = 0.02
"""Standard deviation of the noise on each coordinate."""
MAGNITUDE, SPREAD = 1.0, 0.25
"""Mean and standard deviation of an active feature's strength, before ReLU."""
ORTHOGONAL_STEPS = 50
"""Number of optimisation steps that spread the features out."""


class Planted(NamedTuple):
    rows: Tensor  # [rows, d_in], activations @ features + noise
    activations: Tensor  # [rows, features], 0 where a feature is not active
    features: Tensor  # [features, d_in], unit rows


def generate(setting: PlantedRows) -> Planted:
    """Rows of a setting, with their features and activations. The global random state is not changed.

    Structures. independent: features are active independently. correlated: by a low-rank Gaussian copula. hierarchical:
    a feature of the second half is active only with its parent in the first half.
    """
    from sae_lens.synthetic import (
        ActivationGenerator,
        FeatureDictionary,
        generate_random_low_rank_correlation_matrix,
        orthogonal_initializer,
    )

    n, half = setting.features, setting.features // 2
    probability = setting.active / n
    firing = torch.full((n,), probability)
    more: dict[str, Any] = {"mean_firing_magnitudes": MAGNITUDE, "std_firing_magnitudes": SPREAD}
    if setting.structure == "hierarchical":
        firing = torch.cat([torch.full((half,), probability * 4 / 3), torch.full((half,), 0.5)])
        more["modify_activations"] = lambda f: torch.cat([f[:, :half], f[:, half:] * (f[:, :half] > 0)], 1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        spread_out = orthogonal_initializer(num_steps=ORTHOGONAL_STEPS)
        features = FeatureDictionary(n, setting.d_in, bias=False, initializer=spread_out)
        if setting.structure == "correlated":
            more["correlation_matrix"] = generate_random_low_rank_correlation_matrix(
                n, rank=4, correlation_scale=0.3, seed=setting.seed
            )
        with torch.no_grad():
            activations = ActivationGenerator(n, firing, **more).sample(setting.rows)
            rows = features(activations) + NOISE * torch.randn(setting.rows, setting.d_in)
    return Planted(rows, activations, features.feature_vectors.detach())
