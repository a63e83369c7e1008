"""Harvests activations: runs a subject and stores the rows at a hook."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from husai.activations.outliers import limit_of, moments, shrunk
from husai.activations.store import ActivationStore, StoreManifest, StoreWriter
from husai.evidence.levels import random_subject, random_weights
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, publish_directory
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.subjects import modular_addition
from husai.subjects.pretrained import redraw

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger("husai")
DRAWN_AT_ONCE = 65_536
"""Number of rows drawn at a time."""


def check_hook(model: HookedTransformer, hook_name: str) -> None:
    """Raise BadInput if the model has no such hook. The message names similar hooks."""
    known = model.hook_dict
    if hook_name not in known:
        near = difflib.get_close_matches(hook_name, known, 5) or [name for name in known if "resid" in name]
        raise BadInput(
            f"--hook-name {hook_name}: the subject has no such hook point; one of those it has, as "
            f"{', '.join(near[:8])}, or a module as layers.0 expected"
        )


@torch.no_grad()
def width_of(model: HookedTransformer, hook_name: str, tokens: Tensor) -> int:
    """d_in of a hook.

    Args:
        tokens: tokens of one input, `[positions]`.

    Raises:
        BadInput: the hook does not exist, never fires, or its output is not `[batch, position, d_in]`.
    """
    check_hook(model, hook_name)
    with warnings.catch_warnings(action="ignore"):  # of a hook that never fires, which is refused
        cached = model.run_with_cache(tokens[None], names_filter=hook_name)[1]
    if hook_name not in cached:
        raise BadInput(f"--hook-name {hook_name}: it never fires in the subject; a hook that fires expected")
    shape = list(cached[hook_name].shape)
    if len(shape) != 3 or shape[:2] != [1, len(tokens)]:
        raise BadInput(f"--hook-name {hook_name}: its output has shape {shape}; [batch, position, d_in] expected")
    return shape[2]


def check_modular_addition(config: modular_addition.ModularAdditionConfig, hook_names: list[str]) -> None:
    """Raise BadInput for a hook that a modular-addition transformer lacks. Needs no trained model."""
    model, tokens = modular_addition.build_model(config), modular_addition.dataset(config)[0]
    for hook_name in hook_names:
        width_of(model, hook_name, tokens[0])


@torch.no_grad()
def harvest(
    model: HookedTransformer, tokens: Tensor, hook_name: str, position: int, writer: StoreWriter, batch: int = 4096
) -> None:
    """Run `tokens [rows, positions]` through the model, and append the hook's output at `position` to a store."""
    device = next(model.parameters()).device
    with progress(f"harvesting {hook_name} (rows)", len(tokens)) as advance:
        for part in tokens.split(batch):
            _, cached = model.run_with_cache(part.to(device), names_filter=hook_name)
            writer.append(cached[hook_name][:, position])
            advance(len(part))


def harvest_modular_addition(
    subject: Path,
    root: Path,
    hook_name: str,
    position: int | None = None,
    row_seed: int = 0,
    device: torch.device | str = "cpu",
    threads: int = 1,
    require_solved: bool = True,
    force: bool = False,
    random_seed: int | None = None,
) -> Path:
    """Folder of the store with every pair's activation at one hook and position. It is harvested if missing.

    Args:
        subject: folder of a modular-addition subject.
        root: folder of stores. The name of a store is a digest of its inputs.
        position: token position. None: the position of "=".
        row_seed: seed of the order of the rows.
        random_seed: seed of the random weights that replace the subject's. None: the subject's own weights.
    """
    description = modular_addition.describe(subject, require_solved)
    control = None if random_seed is None else random_weights(random_seed)
    sha256 = description["digest"]
    subject_digest = sha256 if random_seed is None else random_subject(sha256, random_seed)
    config = modular_addition.ModularAdditionConfig(**description["config"])
    position = config.answer_position if position is None else position
    key = digest(
        {
            "subject": subject_digest,
            "hook_name": hook_name,
            "position": position,
            "row_seed": row_seed,
            "code": code_version(harvest),
            "device": torch.device(device).type,
            "threads": threads,
        }
    )
    folder = root / f"modular_addition-{key[:16]}"

    def build(partial: Path) -> None:
        model, _, _ = modular_addition.load(subject, require_solved)
        if random_seed is not None:
            redraw(model, random_seed)
        tokens, _, _, _ = modular_addition.dataset(config)
        if not -tokens.shape[1] <= position < tokens.shape[1]:
            raise BadInput(f"--position {position}: the sequence has positions 0 to {tokens.shape[1] - 1}")
        order = torch.randperm(len(tokens), generator=generator(row_seed, "rows"))
        writer = StoreWriter(partial, width_of(model, hook_name, tokens[0]))
        harvest(model.to(device, print_details=False), tokens[order], hook_name, position, writer)
        writer.finish("modular_addition", subject_digest, hook_name, str(position), row_seed, control)

    publish_directory(folder, build, replace=force)
    return folder


def gaussian_rows(stores: Sequence[ActivationStore], root: Path, seed: int = 0) -> list[Path]:
    """Folders of control stores: equally many rows of a normal distribution with the stores' joint mean and covariance.

    Such rows keep every second moment and hold no feature. The agreement of SAEs that are trained on them is due to
    mean and covariance alone. Memory: one shard and a covariance matrix. The draws of a store do not depend on later
    stores. Therefore the first store of a joint draw equals its single draw.

    Args:
        stores: stores of the same rows at several hooks, or one store.

    Raises:
        BadInput: the stores hold different numbers of rows.
    """
    first = stores[0].manifest
    if any(s.rows != first.rows or s.manifest.heldout_rows != first.heldout_rows for s in stores):
        raise BadInput("activations: stores of the same rows expected")
    normal: list[tuple[Tensor, Tensor]] = []
    folders, ends = [], [0, *accumulate(s.d_in for s in stores)]
    for number, store in enumerate(stores):
        m, sources = store.manifest, [s.digest for s in stores[: number + 1]]
        key = {"sources": sources, "seed": seed, "code": code_version(gaussian_rows)}
        folder = root / f"{m.subject}-gaussian-{digest(key)[:16]}"

        def build(partial: Path, number: int = number, m: StoreManifest = m) -> None:
            if not normal:
                normal.append(_joint_normal(stores))
            start, stop = ends[number : number + 2]
            mean, root_of_covariance = (t[start:stop] for t in normal[0])
            writer = StoreWriter(partial, stop - start, m.dtype)
            for row in range(0, m.rows, DRAWN_AT_ONCE):
                size = min(DRAWN_AT_ONCE, m.rows - row)
                z = [_standard_normal(size, ends[i + 1] - ends[i], seed, row, i) for i in range(number + 1)]
                writer.append((torch.cat(z, 1) @ root_of_covariance[:, :stop].T + mean).float())
            facts = m.subject, m.subject_digest, m.hook_name, m.position, m.row_seed
            writer.finish(*facts, control=f"gaussian(seed={seed})", heldout_rows=m.heldout_rows)

        publish_directory(folder, build)
        folders.append(folder)
    return folders


def _standard_normal(rows: int, d: int, seed: int, row: int, number: int) -> Tensor:
    """Standard normal numbers `[rows, d]` for a block of rows of one store."""
    streams = ("gaussian", row) if number == 0 else ("gaussian", row, number)
    return torch.randn(rows, d, generator=generator(seed, *streams), dtype=torch.float64)


def _joint_normal(stores: Sequence[ActivationStore]) -> tuple[Tensor, Tensor]:
    """(mean `[d]`, a square root `[d, d]` of the covariance) of the concatenated rows of all stores, float64.

    Outliers are shrunk as in training. The root is block-triangular: rows of a store are a regression on the draws of
    earlier stores, plus a draw of the residual.
    """
    mean = torch.cat([moments(s)[0] for s in stores])
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for start in range(0, stores[0].rows, DRAWN_AT_ONCE) if len(stores) > 1 else ():
        stop = min(start + DRAWN_AT_ONCE, stores[0].rows)
        centred = torch.cat([shrunk(s.read(start, stop), limit_of(s)).double() for s in stores], 1) - mean
        covariance += centred.T @ centred
    covariance /= max(1, stores[0].rows - 1)
    root_of_covariance = torch.zeros_like(covariance)
    first = 0
    for store in stores:
        before, columns = slice(0, first), slice(first, first + store.d_in)
        on_before = covariance[columns, before] @ torch.linalg.pinv(root_of_covariance[before, before]).T
        values, vectors = torch.linalg.eigh(moments(store)[1] - on_before @ on_before.T)
        root_of_covariance[columns, before] = on_before
        root_of_covariance[columns, columns] = vectors * values.clamp_min(0).sqrt()
        first += store.d_in
    return mean, root_of_covariance
