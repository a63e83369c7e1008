"""SAEs trained alike on Gaussian rows: what the mean and the covariance of the activations make reproducible."""

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
    """SAEs trained by the same grid and recipe on as many rows of N(μ, Σ) of a store; trained once for all phases.

    Args:
        artifact_root: cells and checkpoints lie below it, in controls/.
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
    """Transcoders trained alike on rows of the joint normal distribution of what they read and write. What these write
    are the very rows that `gaussian` draws of the same store."""
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
    """SAEs of a control store, or transcoders from it to a target; trained once for all phases."""
    root = artifact_root / "controls"
    written = target or store
    saes = train_or_find(Cells(root / "cells"), store, grid, config, device, threads, target).members
    members = [AlikeMember.of(m).model_copy(update={"checkpoint": None}) for m in saes]
    named = Alike(subject_digest=written.manifest.subject_digest, store_digest=written.digest, members=members)
    return ControlArm(written, [own_dictionary(root / m.checkpoint) for m in saes], named)
