"""What two dictionaries that have nothing to do with each other would score, for the same shapes and the same data.

Each null takes a pair of dictionaries and gives a pair to score in its place. None of them knows the true features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def isotropic(a: Tensor, b: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian directions of the same shapes."""
    return torch.randn(a.shape, generator=g), torch.randn(b.shape, generator=g)


@dataclass
class Spectrum:
    """Principal components of the activations, with (near-)degenerate ones grouped.

    Two neighbouring eigenvalues that differ by less than their sampling error λ·√(2/n) have no eigenvectors of their
    own, only a common eigenspace (North et al. 1982, "Sampling errors in the estimation of empirical orthogonal
    functions", rule of thumb). Eigenvalues at rounding level form one group.
    """

    components: Tensor  # [d, d], a column each, by falling eigenvalue; where it is held, the mean direction last
    eigenvalues: Tensor  # [d]
    groups: list[range]  # of the columns that are drawn; the mean direction is in none

    @classmethod
    def of(cls, covariance: Tensor, rows: int, mean: Tensor | None = None) -> Spectrum:
        """From a covariance `[d, d]` estimated on `rows` rows.

        Args:
            mean: `[d]`, of the rows. Its direction is then set apart and left as it is: what two dictionaries share
                with the mean is no feature of either. A mean within its sampling error is none. The other columns are
                components of the space beside it: for `spectral` alone. None: the mean is not set apart.
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
        """Columns of the groups of each size, int `[groups, size]`: groups of one size are drawn in one call."""
        sizes = sorted({len(group) for group in self.groups})
        return [torch.tensor([list(g) for g in self.groups if len(g) == size]) for size in sizes]

    def turned(self, coordinates: Tensor, g: torch.Generator) -> Tensor:
        """Rows `[n, d]` in the coordinates of the components, with each group of columns rotated at random, a single
        column's sign flipped at random, and a mean direction that is set apart left as it is."""
        drawn = coordinates.clone()
        for columns in self.columns_by_size:
            rotations = random_rotations(len(columns), columns.shape[1], g)  # [groups, size, size]
            drawn[:, columns] = torch.einsum("ngs,gst->ngt", coordinates[:, columns], rotations)
        return drawn

    def effective_rank(self) -> float:
        """exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007)."""
        p = self.eigenvalues.double() / self.eigenvalues.double().sum()
        return torch.special.entr(p).sum().exp().item()


def spectral(a: Tensor, b: Tensor, spectrum: Spectrum, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """`a`, and `b` with every principal component's sign flipped at random, groups of components rotated at random; a
    mean direction that the spectrum sets apart is left as it is.

    All cosines inside `b` and the energy of each of its features in each group stay; only what aligned it with `a`
    beyond the spectrum of the activations is gone. A feature that is a single component by itself is left where it
    was: such a feature has no excess over this null, by design.
    """
    return a, spectrum.turned(b @ spectrum.components, g) @ spectrum.components.T


def random_rotations(count: int, size: int, g: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrices `[count, size, size]` (Mezzadri 2007, "How to generate random matrices from
    the classical compact groups", section 5); of size 1, signs."""
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=g, dtype=torch.float64))
    return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]).float()


def covariance_matched(a: Tensor, b: Tensor, spectrum: Spectrum, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions drawn with the covariance of the activations."""
    root = spectrum.eigenvalues.sqrt() * spectrum.components  # [d, d]; z @ root.T has the covariance
    return torch.randn(a.shape, generator=g) @ root.T, torch.randn(b.shape, generator=g) @ root.T
