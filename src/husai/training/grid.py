"""A grid of SAEs on one store as one cell a pass: trained once, then found."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes

from husai.activations.store import ActivationStore, TextUsed
from husai.activations.stream import ActivationStream
from husai.dictionaries import checkpoints
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, write_bytes
from husai.training import memory
from husai.training.consistency import References
from husai.training.stack import Member
from husai.training.trainer import (
    Trained,
    Training,
    TrainingConfig,
    check_members,
    evaluate,
    memory_sizes,
    run_together,
    train,
)

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
        m = store.manifest
        about = Trainees(m.subject, m.subject_digest, m.hook_name, store.digest, m.control, source_of(m.text))
        _, rows = store.split(config.heldout_fraction)
        folder = root / "checkpoints" / name
        records, files = write_all(trained, about, config, root, folder, Heldout(store, rows, target))
        return {"members": records, "curve_steps": curve_steps, "snapshot_steps": config.snapshot_steps()}, files

    return cells.get("training", key, compute)


@dataclass(frozen=True)
class Trainees:
    """What SAEs were trained on, as their checkpoints say it."""

    subject: str
    subject_digest: str
    hook_name: str
    store_digest: str
    control: str | None
    text: str | None
    """Source of the text; None for the packaged one."""
    streamed: bool = False


def source_of(used: TextUsed | None) -> str | None:
    return None if used is None else used.source


@dataclass(frozen=True)
class Heldout:
    """Rows that figures are of."""

    store: ActivationStore
    rows: range
    target: ActivationStore | None = None


def write_all(
    trained: list[Trained], about: Trainees, config: TrainingConfig, root: Path, folder: Path, heldout: Heldout
) -> tuple[list[dict], list[Path]]:
    """(a record of each SAE, as `train_or_find` gives them; the files of their checkpoints, below `folder`)."""
    records, files, target = [], [], heldout.target
    more: dict[str, Any] = {} if about.text is None else {"text": about.text}
    more |= {"streamed": True} if about.streamed else {}
    for t in trained:
        m = t.member
        t.sae.weights = {name: w.float() for name, w in t.sae.weights.items()}
        t.sae.metadata = {
            "model_name": about.subject,
            "hook_name": about.hook_name,
            **({} if target is None else {"hook_name_out": target.manifest.hook_name}),
            "husai": {
                **asdict(m),
                "training": asdict(config),
                "store_digest": about.store_digest,
                "target_digest": None if target is None else target.digest,
                "subject_digest": about.subject_digest,
                "control": about.control,
                **more,
            },
        }
        figures, firing_rate = evaluate(t.sae, heldout.store, heldout.rows, target)
        label = f"{m.family}_d{m.d_sae}_k{m.k}_lr{m.learning_rate!r}_seed{m.seed}"
        label += f"_order{m.order_seed}" if m.order_seed != m.seed else ""
        label += f"_pull{m.assignment_weight!r}_{m.reference[:8]}" if m.reference else ""
        place = folder / label
        files += checkpoints.save(t.sae, place, firing_rate)
        write_bytes(place / SNAPSHOTS, to_bytes({"W_dec": t.decoders.float().contiguous()}))
        files.append(place / SNAPSHOTS)
        records.append(
            {
                **asdict(m),
                "checkpoint": str(place.relative_to(root)),
                "checkpoint_sha256": checkpoints.checkpoint_digest(place),
                "heldout": figures,
                "l0_miss": figures["l0"] / m.k - 1,
                "curve": t.curve,
                "aux_steps": t.aux_steps,
            }
        )
    return records, files


def train_on_stream(
    cells: Cells,
    stream: ActivationStream,
    heldout: dict[str, ActivationStore],
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Train the grid at every hook of a stream in one pass of the model, or read the finished cell.

    Args:
        heldout: hook -> activations of held-out documents, all of which figures are of.
        config: its `window_rows` are those of the stream's buffer.

    Returns:
        As `train_or_find`; each record begins with its `hook_name`.

    Raises:
        BadInput: the grid does not fit into memory in one pass, or what `trainer.Training` refuses.
    """
    check_members(grid)
    hooks = stream.hooks
    config = replace(config, propose=config.proposes(device, max(stream.widths.values())))
    for of_hook in hooks.values():
        if len(memory.passes(grid * len(hooks), memory_sizes(of_hook, None, config), device)) > 1:
            raise BadInput(
                f"{len(grid)} SAEs at {len(hooks)} hooks: they do not fit into memory together, as one pass of the "
                "model needs it; fewer seeds, widths or hooks expected"
            )
    key = {
        "members": [asdict(m) for m in grid],
        "config": asdict(config),
        "streams": {hook: of_hook.digest for hook, of_hook in hooks.items()},
        "heldout": {hook: store.digest for hook, store in heldout.items()},
        "device": device.type,
        "threads": threads,
        "dtype": str(dtype),
    }
    root, name = cells.folder.parent, digest(key)[:16]
    key["code"] = code_version(train_on_stream)

    def compute() -> tuple[dict, list[Path]]:
        cells.folder.mkdir(parents=True, exist_ok=True)
        states = {hook: cells.folder / f"training-{digest([key, hook])[:16]}.state.safetensors" for hook in hooks}
        trainings = {
            hook: Training(of_hook, grid, config, device, states[hook], dtype, in_order=True)
            for hook, of_hook in hooks.items()
        }
        began = time.monotonic()
        run_together([*trainings.values()])
        seconds = time.monotonic() - began
        log.info(
            "%d rows of %d hooks in %.0f s, %.0f of them the model's", stream.rows, len(hooks), seconds, stream.seconds
        )
        records, files, subject, used = [], [], stream.subject, stream.inputs.used
        for number, (hook, training) in enumerate(trainings.items()):
            trained, curve_steps = training.finish()
            about = (subject.name, subject.digest, hook, hooks[hook].digest, subject.control, source_of(used))
            folder = root / "checkpoints" / name / str(number) if len(hooks) > 1 else root / "checkpoints" / name
            store = heldout[hook]
            of_hook = write_all(
                trained, Trainees(*about, streamed=True), config, root, folder, Heldout(store, range(store.rows))
            )
            records += [{"hook_name": hook, **r} for r in of_hook[0]]
            files += of_hook[1]
        stream.close()
        return {"members": records, "curve_steps": curve_steps, "snapshot_steps": config.snapshot_steps()}, files

    return cells.get("training", key, compute)
