"""Nulls: pairs of unrelated dictionaries with the same shapes, for scores by chance on the same data.

Each null takes a pair of dictionaries and returns a pair that is scored instead. No null knows the true features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def isotropic(a: Tensor, b: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian directions with the same shapes."""
    return torch.randn(a.shape, generator=g), torch.randn(b.shape, generator=g)


@dataclass
class Spectrum:
    """Principal components of the activations, with groups of (nearly) degenerate ones.

    If two neighbouring eigenvalues differ by less than their sampling error λ·√(2/n), only their common eigenspace is
    determined (North et al. 1982, "Sampling errors in the estimation of empirical orthogonal functions", rule of
    thumb). Eigenvalues at rounding level form one group.
    """

    components: Tensor  # [d, d], columns by falling eigenvalue, then the direction of the mean if it is held
    eigenvalues: Tensor  # [d]
    groups: list[range]  # groups of drawn columns; the direction of the mean is in none

    @classmethod
    def of(cls, covariance: Tensor, rows: int, mean: Tensor | None = None) -> Spectrum:
        """Spectrum of a covariance `[d, d]` that was estimated on `rows` rows.

        Args:
            mean: mean `[d]` of the rows. Its direction is held fixed, because components along the mean are no common
                features. A mean within its sampling error counts as 0. The other columns are components of the
                orthogonal space; such a spectrum serves `spectral` alone. None: no direction is held.
        """
        covariance = covariance.double()
        mean = None if mean is None else mean.double()
        if mean is None or mean.square().sum() <= covariance.trace() / rows:
            return cls._of_space(covariance, rows)
        held = (mean / mean.norm())[:, None]
        space = torch.linalg.qr(torch.cat([held, torch.eye(len(held), dtype=torch.float64)], 1))[0][:, 1:]
        beside = cls._of_space(space.T @ covariance @ space, rows)
        columns = torch.cat([space @ beside.components.double(), held], 1)
        along = (held.T @ covariance @ held)[0].clamp_min(0)
        return cls(columns.float(), torch.cat([beside.eigenvalues, along.float()]), beside.groups)

    @classmethod
    def _of_space(cls, covariance: Tensor, rows: int) -> Spectrum:
        if len(covariance) == 0:
            return cls(torch.zeros(0, 0), torch.zeros(0), [])
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        floor = values[0] * len(values) * torch.finfo(torch.float32).eps
        starts = [0]
        for i in range(1, len(values)):
            separate = values[i - 1] - values[i] > values[i - 1] * (2 / rows) ** 0.5 and values[i - 1] > floor
            if separate:
                starts.append(i)
        groups = [range(s, e) for s, e in zip(starts, [*starts[1:], len(values)], strict=True)]
        return cls(vectors.float(), values.float(), groups)

    @cached_property
    def columns_by_size(self) -> list[Tensor]:
        """Columns of the groups of each size, int `[groups, size]`. Groups of one size are drawn in one call."""
        sizes = sorted({len(group) for group in self.groups})
        return [torch.tensor([list(g) for g in self.groups if len(g) == size]) for size in sizes]

    def turned(self, coordinates: Tensor, g: torch.Generator) -> Tensor:
        """Rows `[n, d]` in coordinates of the components, after a random rotation of each group of columns.

        A group of one column gets a random sign. A held direction of the mean does not change.
        """
        drawn = coordinates.clone()
        for columns in self.columns_by_size:
            rotations = random_rotations(len(columns), columns.shape[1], g)  # [groups, size, size]
            if columns.shape[1] == 1:  # in place: most components are alone
                drawn[:, columns[:, 0]] *= rotations[:, 0, 0]
            else:
                drawn[:, columns] = torch.einsum("ngs,gst->ngt", coordinates[:, columns], rotations)
        return drawn

    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised eigenvalues (Roy & Vetterli 2007)."""
        p = self.eigenvalues.double() / self.eigenvalues.double().sum()
        return torch.special.entr(p).sum().exp().item()


def spectral(a: Tensor, b: Tensor, spectrum: Spectrum, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`a`, and `b` after random rotations of groups of principal components, with random signs of single components.

    A held direction of the mean does not change. All cosines inside `b`, and the energy of each of its features in each
    group, do not change. Only an alignment with `a` beyond the spectrum of the activations is removed. A feature that
    equals one component keeps its axis, therefore it has no excess over this null, by design.
    """
    return a, spectrum.turned(b @ spectrum.components, g) @ spectrum.components.T


def random_rotations(count: int, size: int, g: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrices `[count, size, size]`; random signs for size 1.

    The method is that of Mezzadri (2007, "How to generate random matrices from the classical compact groups", section
    5).
    """
    normal = torch.randn(count, size, size, generator=g, dtype=torch.float64)
    if size == 1:  # a decomposition of each number by itself would take most of a draw's time
        return normal.sign().float()
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]).float()


def covariance_matched(a: Tensor, b: Tensor, spectrum: Spectrum, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random directions with the covariance of the activations."""
    root = spectrum.eigenvalues.sqrt() * spectrum.components  # [d, d]; z @ root.T has the covariance
    return torch.randn(a.shape, generator=g) @ root.T, torch.randn(b.shape, generator=g) @ root.T
