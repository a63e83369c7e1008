"""A grid of SAEs on one store as one cell a pass: trained once, then found."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from husai.activations.store import ActivationStore
from husai.dictionaries import checkpoints
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.files import digest, write_bytes
from husai.training import memory
from husai.training.consistency import References
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig, check_members, evaluate, memory_sizes, train

log = logging.getLogger("husai")
SNAPSHOTS = "snapshots.safetensors"


MISSED_AT_MOST = 0.1  # a penalised family that misses its target by more than this share is reported


def members(
    seeds: list[int],
    widths: list[int],
    ks: list[int],
    learning_rates: list[float],
    families: tuple[str, ...] = ("topk",),
    init_seed: int | None = None,
) -> list[Member]:
    """The product of the axes; each seed seeds initialisation and data order through separate streams.

    Args:
        init_seed: one initialisation for all, a control that the stability code refuses.
    """
    axes = product(families, widths, ks, learning_rates, seeds)
    return [
        Member(seed if init_seed is None else init_seed, d_sae, k, rate, seed, family)
        for family, d_sae, k, rate, seed in axes
    ]


def train_or_find(
    cells: Cells,
    store: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
    target: ActivationStore | None = None,
    references: References | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Train the grid, in one pass over the store where it fits into memory, or read the finished cells.

    Args:
        target: what transcoders reconstruct. references: what members are pulled towards.
        dtype: of the arithmetic; checkpoints are float32.

    Returns:
        {"members": one record each (the fields of `Member`; checkpoint: its folder, relative to the output folder;
        checkpoint_sha256; heldout: the figures of `evaluate`; l0_miss: share by which held-out L0
        misses k; curve; aux_steps), "curve_steps", "snapshot_steps"}
    """
    check_members(grid)
    config = replace(config, propose=config.proposes(device, store.d_in))
    divided = memory.passes(grid, memory_sizes(store, target, config), device)
    if len(divided) > 1:
        log.info("%d SAEs do not fit into memory together: trained in %d passes over the data", len(grid), len(divided))
    arguments = config, device, threads, target, references, dtype
    results = [_one_pass(cells, store, [grid[i] for i in p], *arguments) for p in divided]
    records = [record for result in results for record in result["members"]]
    for r in records:
        if abs(r["l0_miss"]) > MISSED_AT_MOST:
            log.warning(
                "%s, d_sae %d, seed %d: L0 %.1f misses its target %d by more than %.0f %%",
                *(r["family"], r["d_sae"], r["seed"], r["heldout"]["l0"], r["k"], 100 * MISSED_AT_MOST),
            )
    return results[0] | {"members": records}


def _one_pass(
    cells: Cells,
    store: ActivationStore,
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
    target: ActivationStore | None,
    references: References | None,
    dtype: torch.dtype,
) -> dict:
    key = {
        "members": [asdict(m) for m in grid],
        "config": asdict(config),
        "store": store.digest,
        "target": None if target is None else target.digest,
        "device": device.type,
        "threads": threads,
        "stacks": memory.stacks(grid, memory_sizes(store, target, config), device),
        "assign_every": references and references.every,
        "dtype": str(dtype),
    }
    # Results name this folder, so its name does not change with the code. The cell's key does.
    root, name = cells.folder.parent, digest(key)[:16]
    key["code"] = code_version(train_or_find)

    def compute() -> tuple[dict, list[Path]]:
        state = cells.folder / f"training-{digest(key)[:16]}.state.safetensors"
        state.parent.mkdir(parents=True, exist_ok=True)
        trained, curve_steps = train(
            store, grid, config, device, state, dtype=dtype, target=target, references=references
        )
        _, heldout = store.split(config.heldout_fraction)
        records, files = [], []
        for t in trained:
            m = t.member
            t.sae.weights = {name: w.float() for name, w in t.sae.weights.items()}
            t.sae.metadata = {
                "model_name": store.manifest.subject,
                "hook_name": store.manifest.hook_name,
                **({} if target is None else {"hook_name_out": target.manifest.hook_name}),
                "husai": {
                    **asdict(m),
                    "training": asdict(config),
                    "store_digest": store.digest,
                    "target_digest": None if target is None else target.digest,
                    "subject_digest": store.manifest.subject_digest,
                    "control": store.manifest.control,
                },
            }
            figures, firing_rate = evaluate(t.sae, store, heldout, target)
            label = f"{m.family}_d{m.d_sae}_k{m.k}_lr{m.learning_rate!r}_seed{m.seed}"
            label += f"_order{m.order_seed}" if m.order_seed != m.seed else ""
            label += f"_pull{m.assignment_weight!r}_{m.reference[:8]}" if m.reference else ""
            folder = root / "checkpoints" / name / label
            files += checkpoints.save(t.sae, folder, firing_rate)
            write_bytes(folder / SNAPSHOTS, to_bytes({"W_dec": t.decoders.float().contiguous()}))
            files.append(folder / SNAPSHOTS)
            records.append(
                {
                    **asdict(m),
                    "checkpoint": str(folder.relative_to(root)),
                    "checkpoint_sha256": checkpoints.checkpoint_digest(folder),
                    "heldout": figures,
                    "l0_miss": figures["l0"] / m.k - 1,
                    "curve": t.curve,
                    "aux_steps": t.aux_steps,
                }
            )
        return {"members": records, "curve_steps": curve_steps, "snapshot_steps": config.snapshot_steps()}, files

    return cells.get("training", key, compute)
