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
from husai.evidence.schemas import Grid, GridMember
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
MISSED_AT_MOST = 0.1
"""Share by which the L0 of a penalised architecture may miss its target without a warning."""


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
) -> Grid:
    """Train the grid, in one pass over the store if it fits into memory, or read the finished cells.

    Args:
        target: activations that transcoders reconstruct.
        references: dictionaries that members are pulled towards.
        dtype: precision of the arithmetic; checkpoints are float32.
    """
    check_members(grid)
    config = replace(config, propose=config.proposes(device, store.d_in))
    divided = memory.passes(grid, memory_sizes(store, target, config), device)
    if len(divided) > 1:
        log.info("%d SAEs do not fit into memory together: trained in %d passes over the data", len(grid), len(divided))
    arguments = config, device, threads, target, references, dtype
    passes = [_one_pass(cells, store, [grid[i] for i in p], *arguments) for p in divided]
    trained = [m for one_pass in passes for m in one_pass.members]
    for m in trained:
        if abs(m.l0_miss) > MISSED_AT_MOST:
            log.warning(
                "%s, d_sae %d, seed %d: L0 %.1f misses its target %d by more than %.0f %%",
                *(m.family, m.d_sae, m.seed, m.heldout.l0, m.k, 100 * MISSED_AT_MOST),
            )
    return passes[0].model_copy(update={"members": trained})


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
) -> Grid:
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
        source = Trainees(m.subject, m.subject_digest, m.hook_name, store.digest, m.control, source_of(m.text))
        _, rows = store.split(config.heldout_fraction)
        folder = root / "checkpoints" / name
        saes, files = write_all(trained, source, config, root, folder, HeldoutRows(store, rows, target))
        result = Grid(members=saes, curve_steps=curve_steps, snapshot_steps=config.snapshot_steps())
        return result.to_json(), files

    return Grid.model_validate(cells.get("training", key, compute))


@dataclass(frozen=True)
class Trainees:
    """Source of the rows of a training, as its checkpoints name it."""

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
class HeldoutRows:
    """Rows that held-out figures are computed on."""

    store: ActivationStore
    rows: range
    target: ActivationStore | None = None


def write_all(
    trained: list[Trained], source: Trainees, config: TrainingConfig, root: Path, folder: Path, heldout: HeldoutRows
) -> tuple[list[GridMember], list[Path]]:
    """(the SAEs, files of their checkpoints below `folder`)."""
    saes, files, target = [], [], heldout.target
    more: dict[str, Any] = {} if source.text is None else {"text": source.text}
    more |= {"streamed": True} if source.streamed else {}
    departs = heldout.store.manifest.harvesting
    more |= {} if departs is None else {"harvesting": departs}
    streamed: dict[str, Any] = {"hook_name": source.hook_name} if source.streamed else {}
    for t in trained:
        m = t.member
        t.sae.weights = {name: w.float() for name, w in t.sae.weights.items()}
        t.sae.metadata = {
            "model_name": source.subject,
            "hook_name": source.hook_name,
            **({} if target is None else {"hook_name_out": target.manifest.hook_name}),
            "husai": {
                **asdict(m),
                "training": asdict(config),
                "store_digest": source.store_digest,
                "target_digest": None if target is None else target.digest,
                "subject_digest": source.subject_digest,
                "control": source.control,
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
        saes.append(
            GridMember(
                **asdict(m),
                **streamed,
                checkpoint=str(place.relative_to(root)),
                checkpoint_sha256=checkpoints.checkpoint_digest(place),
                heldout=figures,
                l0_miss=figures.l0 / m.k - 1,
                curve=t.curve,
                aux_steps=t.aux_steps,
            )
        )
    return saes, files


def train_on_stream(
    cells: Cells,
    stream: ActivationStream,
    heldout: dict[str, ActivationStore],
    grid: list[Member],
    config: TrainingConfig,
    device: torch.device,
    threads: int,
    dtype: torch.dtype = torch.float32,
) -> Grid:
    """Train the grid at every hook of a stream in one pass of the model, or read the finished cell.

    Args:
        heldout: hook -> activations of held-out documents, on all of which figures are computed.
        config: settings, whose `window_rows` are those of the stream's buffer.

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
        saes: list[GridMember] = []
        files, subject, used = [], stream.subject, stream.inputs.used
        for number, (hook, training) in enumerate(trainings.items()):
            trained, curve_steps = training.finish()
            names = subject.name, subject.digest, hook, hooks[hook].digest, subject.control, source_of(used)
            source = Trainees(*names, streamed=True)
            folder = root / "checkpoints" / name / str(number) if len(hooks) > 1 else root / "checkpoints" / name
            rows = HeldoutRows(heldout[hook], range(heldout[hook].rows))
            hook_saes, hook_files = write_all(trained, source, config, root, folder, rows)
            saes += hook_saes
            files += hook_files
        stream.close()
        result = Grid(members=saes, curve_steps=curve_steps, snapshot_steps=config.snapshot_steps())
        return result.to_json(), files

    return Grid.model_validate(cells.get("training", key, compute))
