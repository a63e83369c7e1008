"""Trains control SAEs on Gaussian rows. They show how much agreement the activations' mean and covariance explain."""

from __future__ import annotations

from pathlib import Path

import torch

from husai.activations.harvest import gaussian_rows
from husai.activations.store import ActivationStore
from husai.evidence.schemas import Alike, AlikeMember
from husai.runs.cells import Cells
from husai.stability.study import ControlArm, own_dictionary
from husai.training.grid import train_or_find
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig


def gaussian(
    artifact_root: Path,
    store: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
) -> ControlArm:
    """SAEs of the same grid and recipe, trained on rows of N(μ, Σ) with a store's moments. All phases share them.

    Args:
        artifact_root: holds cells and checkpoints, in controls/.
    """
    noise = ActivationStore.open(gaussian_rows([store], artifact_root / "activations")[0])
    return trained(artifact_root, noise, grid, config, device, threads)


def gaussian_transcoders(
    artifact_root: Path,
    read: ActivationStore,
    written: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
) -> ControlArm:
    """Transcoders of the same recipe, trained on the joint normal distribution of input and output activations.

    The output rows equal the rows that `gaussian` draws for the same store.
    """
    folders = gaussian_rows([written, read], artifact_root / "activations")
    target, noise = (ActivationStore.open(folder) for folder in folders)
    return trained(artifact_root, noise, grid, config, device, threads, target)


def trained(
    artifact_root: Path,
    store: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
    target: ActivationStore | None = None,
) -> ControlArm:
    """SAEs of a control store, or transcoders from it to a target. All phases share them."""
    root = artifact_root / "controls"
    written = target or store
    saes = train_or_find(Cells(root / "cells"), store, grid, config, device, threads, target).members
    members = [AlikeMember.of(m).model_copy(update={"checkpoint": None}) for m in saes]
    named = Alike(subject_digest=written.manifest.subject_digest, store_digest=written.digest, members=members)
    return ControlArm(written, [own_dictionary(root / m.checkpoint) for m in saes], named)
