"""A grid of SAEs on one store as one cell: trained once, then found."""

from __future__ import annotations

import logging
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.runs.cells import Cells, code_version
from husai.runs.files import digest, write_bytes
from husai.training.trainer import Member, TrainingConfig, check_members, evaluate, train

log = logging.getLogger("husai")
SNAPSHOTS = "snapshots.safetensors"


def members(seeds: list[int], widths: list[int], ks: list[int], learning_rates: list[float]) -> list[Member]:
    """The product of the axes; each seed seeds initialisation and data order through separate streams."""
    return [Member(seed, d_sae, k, rate, seed) for d_sae, k, rate, seed in product(widths, ks, learning_rates, seeds)]


def train_or_find(
    cells: Cells,
    store: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
) -> dict:
    """Train the grid in one pass, or read the finished cell.

    Returns:
        {"members": one record each (the fields of `Member`; checkpoint: its folder, relative to the output folder;
        checkpoint_sha256; heldout: the figures of `evaluate`; curve; aux_steps), "curve_steps", "snapshot_steps"}
    """
    check_members(grid)
    key = {
        "members": [asdict(m) for m in grid],
        "config": asdict(config),
        "store": store.digest,
        "code": code_version("training", "dictionaries", "activations"),
        "device": device.type,
        "threads": threads,
    }
    name = digest(key)[:16]
    root = cells.folder.parent

    def compute() -> tuple[dict, list[Path]]:
        state = cells.folder / f"training-{name}.state.safetensors"
        state.parent.mkdir(parents=True, exist_ok=True)
        trained, curve_steps = train(store, grid, config, device, state)
        _, heldout = store.split(config.heldout_fraction)
        records, files = [], []
        for t in trained:
            m = t.member
            t.sae.metadata = {
                "model_name": store.manifest.subject,
                "hook_name": store.manifest.hook_name,
                "husai": {
                    **asdict(m),
                    "training": asdict(config),
                    "store_digest": store.digest,
                    "subject_digest": store.manifest.subject_digest,
                    "control": store.manifest.control,
                },
            }
            figures, firing_rate = evaluate(t.sae, store, heldout)
            folder = root / "checkpoints" / name / f"d{m.d_sae}_k{m.k}_lr{m.learning_rate:g}_seed{m.seed}"
            files += checkpoints.save(t.sae, folder, firing_rate)
            write_bytes(folder / SNAPSHOTS, to_bytes({"W_dec": t.decoders.contiguous()}))
            files.append(folder / SNAPSHOTS)
            records.append(
                {
                    **asdict(m),
                    "checkpoint": str(folder.relative_to(root)),
                    "checkpoint_sha256": checkpoints.checkpoint_digest(folder),
                    "heldout": figures,
                    "curve": t.curve,
                    "aux_steps": t.aux_steps,
                }
            )
        return {"members": records, "curve_steps": curve_steps, "snapshot_steps": config.snapshot_steps()}, files

    return cells.get("training", key, compute)
