"""Where a phase's activations come from: a store that is given, or one harvested from a subject, found or made."""

from __future__ import annotations

from pathlib import Path

import torch

from husai.activations.harvest import harvest_modular_addition
from husai.activations.store import ActivationStore
from husai.subjects import modular_addition
from husai.subjects.modular_addition import ModularAdditionConfig

DEFAULT_HOOK = "blocks.0.hook_resid_post"


def open_store(
    artifact_root: Path,
    device: torch.device,
    threads: int,
    store: Path | None = None,
    subject: Path | None = None,
    hook_name: str | None = None,
    position: int | None = None,
    config: ModularAdditionConfig | None = None,
) -> ActivationStore:
    """The store to study.

    Args:
        store: a store's folder; where None, the activations of `subject` are harvested, or found below `artifact_root`.
        subject: folder of a trained transformer; where None, one is trained by `config`, or found.
        hook_name: by default the store's, or DEFAULT_HOOK. position: by default that of "=".

    Raises:
        BadInput: the store is damaged, or of another subject or hook.
    """
    if store is not None:
        expected = modular_addition.describe(subject)["digest"] if subject is not None else None
        return ActivationStore.open(store, expected, hook_name)
    config = config or ModularAdditionConfig()
    if subject is None:
        subject = modular_addition.train_or_find(config, artifact_root / "subjects", device, threads)
    folder = harvest_modular_addition(
        subject,
        artifact_root / "activations",
        hook_name or DEFAULT_HOOK,
        position,
        device=device,
        threads=threads,
        require_solved=config.epochs > 0,
    )
    return ActivationStore.open(folder)
