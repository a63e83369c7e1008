"""Summarises the quality of a group of SAEs, and names unusual figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from husai.evidence import levels, rules
from husai.evidence.names import PRIMARY_SCORE
from husai.evidence.schemas import Interval, Retrained, Scored, Supplied, read_evaluation

STABLE_SHARE = "share70_alive"
"""Score: share of matched alive features with a cosine of at least 0.7."""


@dataclass(frozen=True)
class Quality:
    """Figures of a group of SAEs. Lists have one value for each SAE, in the order of `names`."""

    names: list[str]
    d_in: int
    d_sae: int
    explained_variance: list[float]
    ce_recovered: list[float]
    dead_share: list[float]
    l0: list[float]
    stable_share: list[float] | None
    """Share of an SAE's alive features that are matched, averaged over the other SAEs. None: not compared."""
    stable: Interval | None
    """Share of matched alive features over all pairs of SAEs."""
    stable_of_controls: float | None
    """Largest mean of this share among the controls."""
    auc: list[float] | None
    """Mean test AUC of probes on `levels.K` features. None: not probed."""
    auc_of_pca: float | None
    auc_of_model: float | None
    """Mean test AUC of probes on principal components, and on the activations themselves."""
    outliers: list[str]
    """Sentences on outlier rows."""

    @classmethod
    def of(cls, results: Any) -> Quality:
        """Figures from the results of a confirmation.

        Raises:
            ValidationError: the results have another shape.
        """
        evaluation = read_evaluation(results)
        seeds = list(evaluation.candidate.identities)
        of_identity = {r.identity: r for r in evaluation.bank.saes if r.candidate}
        records = [of_identity[evaluation.candidate.identities[seed]] for seed in seeds]
        facts = evaluation.candidate.facts
        shares, stable, controls = _stable(evaluation.section)
        auc, pca, model = _probes(evaluation, [r.identity for r in records])
        return cls(
            names=_names(evaluation, seeds),
            d_in=facts.d_in,
            d_sae=facts.d_sae,
            explained_variance=[r.heldout.explained_variance for r in records],
            ce_recovered=[r.core.ce_loss_score for r in records],
            dead_share=[r.heldout.dead_share for r in records],
            l0=[r.heldout.l0 for r in records],
            stable_share=shares,
            stable=stable,
            stable_of_controls=controls,
            auc=auc,
            auc_of_pca=pca,
            auc_of_model=model,
            outliers=rules.outlier_note([r.heldout for r in records]),
        )

    def warnings(self) -> list[str]:
        """Sentences on unusual figures. They decide nothing."""
        names = self.names
        dead = [f"{n} ({share:.0%})" for n, share in zip(names, self.dead_share, strict=True) if rules.many_dead(share)]
        full = [
            f"{n} ({l0:.0f})"
            for n, l0 in zip(names, self.l0, strict=True)
            if rules.not_sparse(l0, self.d_in, self.d_sae)
        ]
        middle = float(np.median(self.explained_variance))
        ev = zip(names, self.explained_variance, strict=True)
        apart = [f"{n} ({value:.3f})" for n, value in ev if abs(value - middle) > rules.UNUSUAL_EV]
        sentences = []
        if len(names) < rules.MINIMUM_SEEDS:
            sentences.append(f"Few SAEs: {len(names)} differ in their seed. A verdict needs {rules.MINIMUM_SEEDS}.")
        if dead:
            sentences.append(
                f"Dead features: at least {rules.MANY_DEAD:.0%} of the features never fire on the held-out tokens in "
                f"{_listed(dead)}."
            )
        if full:
            sentences.append(
                f"Not sparse: L0 is at least half of the smaller of {self.d_sae} features and {self.d_in} input "
                f"dimensions in {_listed(full)}."
            )
        if apart:
            sentences.append(
                f"Outlier: explained variance is more than {rules.UNUSUAL_EV:g} away from the median of {middle:.3f} "
                f"in {_listed(apart)}."
            )
        if max(self.l0) - min(self.l0) > rules.UNUSUAL_L0 * float(np.median(self.l0)):
            sentences.append(
                f"Unequal sparsity: L0 ranges from {min(self.l0):.3g} to {max(self.l0):.3g}. SAEs of one configuration "
                f"usually stay within {rules.UNUSUAL_L0:.0%}."
            )
        if (
            self.auc is not None
            and self.auc_of_pca is not None
            and (below := sum(a < self.auc_of_pca for a in self.auc))
        ):
            sentences.append(
                f"Below PCA: probes on {levels.K} features of the SAE reach a lower AUC than probes on {levels.K} "
                f"principal components ({self.auc_of_pca:.3f}) in {below} of {len(self.auc)} SAEs "
                f"(mean {np.mean(self.auc):.3f})."
            )
        return sentences + self.outliers


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} SAEs: {', '.join(names)}"


def _names(evaluation: Retrained | Supplied, seeds: list[str]) -> list[str]:
    """Names of the SAEs on the page: their folders if these differ, else their seeds."""
    if isinstance(evaluation, Retrained):
        return [f"seed {seed}" for seed in seeds]
    names = [PurePosixPath(evaluation.paths[seed]).name for seed in seeds]
    if len(set(names)) < len(names):
        return [f"SAE {seed}" for seed in seeds]
    return [name if seed in name else f"{name} (number {seed})" for name, seed in zip(names, seeds, strict=True)]


def _stable(section: Scored) -> tuple[list[float] | None, Interval | None, float | None]:
    """(share of each SAE, share over all pairs, largest mean share of a control)."""
    summary = section.stability.scores.get(STABLE_SHARE)
    if summary is None or PRIMARY_SCORE not in section.stability.scores:
        return None, None, None
    matrix = section.scores(None, STABLE_SHARE)
    n = len(matrix)
    controls = [null.mean for null in summary.nulls.values()]
    return [float(row.sum() / (n - 1)) for row in matrix], summary.observed, max(controls, default=None)


def _probes(
    evaluation: Retrained | Supplied, identities: list[str]
) -> tuple[list[float] | None, float | None, float | None]:
    """(AUC of each SAE, AUC of principal components, AUC of the activations), at `levels.K` features."""
    probing, k = evaluation.bank.saebench, str(levels.K)
    if probing is None:
        return None, None, None
    auc = {r.identity: r.means[k].test_auc for r in probing.saes if r.candidate}

    def baseline(start: str) -> float | None:
        means = [b.means for name, b in probing.baselines.items() if name.startswith(start)]
        values = [m[k].test_auc for m in means if k in m]
        return values[0] if values else None

    whole = next((b.means for name, b in probing.baselines.items() if name == "llm"), None)
    model = next(iter(whole.values())).test_auc if whole else None
    return [auc[i] for i in identities], baseline("pca"), model
