"""Siblings of a user's SAE: SAEs of the same recipe with their own initialisation and data order, trained here."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from husai.activations.language_model import Inputs, run
from husai.activations.source import LANGUAGE_MODEL_ROWS, open_store
from husai.activations.store import ActivationStore
from husai.activations.stream import ActivationStream
from husai.dictionaries import catalogue, foreign, recipes
from husai.dictionaries.families import FAMILIES, family_of
from husai.dictionaries.family import Shape
from husai.dictionaries.sae import SAE
from husai.evals import loaded
from husai.evals.candidate import training_store
from husai.evals.loaded import LoadedSAE, LoadedSAEs
from husai.evals.random_model import LEARNING_RATE, PASSES, trained_alike
from husai.evidence.features import SiblingTraining
from husai.evidence.references import same_l0
from husai.evidence.schemas import Heldout
from husai.runs.cells import Cells
from husai.runs.errors import BadInput, CheckFailed, Dependent
from husai.runs.progress import duration, progress
from husai.stability import controls, independence, replicates
from husai.stability.nulls import Spectrum
from husai.stability.recurrence import refuse_unlike, rotations_for
from husai.subjects.hooks import same_place
from husai.training import memory
from husai.training.grid import train_on_stream, train_or_find
from husai.training.stack import Member, Stack, StepSettings
from husai.training.trainer import TrainingConfig

log = logging.getLogger("husai")
DEFAULT = 14
"""Siblings of a single SAE: all of 14 certify a feature at 0.8 (`rules.siblings_needed`)."""
TIMED_STEPS = 3
FLOAT = 4
"""Bytes of a number in checkpoints and stores."""


@dataclass(frozen=True)
class SiblingPlan:
    """How siblings are trained."""

    grid: list[Member]
    config: TrainingConfig
    rows: int | None
    """Rows of the activation store to train on; None: the store that the SAE names."""
    buffer_rows: int | None
    """Rows of the buffer of a stream, on which siblings see each token once; None: they are trained on a store."""
    recipe_known: bool
    """Whether the SAE says how it was trained."""
    recipe_tokens: int | None
    """Tokens that the SAE itself was trained on; None: its files do not say."""

    @property
    def fewer_tokens(self) -> str | None:
        """Why siblings cannot show that a feature is missing; None where they can."""
        if self.recipe_tokens is None:
            return "the files of the SAE do not say how many tokens it was trained on"
        if self.config.tokens < self.recipe_tokens:
            return f"siblings saw {self.config.tokens:,} tokens, the SAE saw {self.recipe_tokens:,}"
        return None


def plan(
    asked: LoadedSAEs, siblings: int, tokens: int | None, rows: int | None, buffer_rows: int | None = None
) -> SiblingPlan:
    """The recipe of an SAE's siblings: the SAE's own where HUSAI trained it, else HUSAI's at its width and L0.

    Args:
        siblings: number of SAEs to train. tokens: each sees; None: as many as the SAE saw. rows: of the store that
            they are trained on, or that Gaussian rows have the moments of. buffer_rows: of a stream.

    Raises:
        BadInput: an SAE that was pulled towards a reference, or one without an active feature.
    """
    first = asked.saes[0]
    settings = recipes.settings_of(first.folder, first.sae)
    own_tokens = recipes.tokens_of(first.sae, settings)
    described = [c.sae.metadata.get("husai") or {} for c in asked.saes]
    taken = {m[name] for m in described for name in ("seed", "order_seed") if name in m}
    seeds = [s for s in range(1, siblings + len(taken) + 1) if s not in taken][:siblings]
    if asked.made is not None:
        made = asked.made
        if made.get("reference") is not None or made.get("assignment_weight"):
            raise BadInput(f"--checkpoint: {first.folder} was pulled towards a reference; an independent SAE expected")
        shape = {n: made[n] for n in ("d_sae", "k", "learning_rate", "family")}
        config = replace(asked.recipe, tokens=tokens or asked.recipe.tokens)
        grid = [Member(seed=s, order_seed=s, **shape) for s in seeds]
        return SiblingPlan(grid, config, rows, whole_batches(buffer_rows, config), True, own_tokens)

    refuse_dead(first)
    k = first.sae.k or max(1, round(first.record.heldout.l0))
    rows = rows or min(LANGUAGE_MODEL_ROWS, tokens or own_tokens or LANGUAGE_MODEL_ROWS)
    tokens = tokens or own_tokens or PASSES * rows
    config = TrainingConfig(tokens=tokens, batch_size=min(1024, rows))
    grid = [Member(s, first.sae.d_sae, k, LEARNING_RATE, s, family_of(first.sae.architecture)) for s in seeds]
    return SiblingPlan(grid, config, rows, whole_batches(buffer_rows, config), False, own_tokens)


def refuse_dead(first: LoadedSAE) -> None:
    """Raise BadInput for an SAE without an active feature, of which nothing can be said."""
    if first.record.heldout.l0 <= 0:
        raise BadInput(
            f"--checkpoint: no feature of {first.folder} fires on the held-out tokens; an alive SAE expected"
        )


def departures(asked: LoadedSAEs, made: SiblingPlan) -> list[str]:
    """How trained siblings differ from the SAE, or depend on each other, in more than the recipe says; sentences."""
    if not made.grid:
        return []
    found, own, family = [], asked.saes[0].sae.architecture, made.grid[0].family
    if not made.recipe_known and own != FAMILIES[family].ARCHITECTURE:
        found.append(f"The siblings have another architecture: {family}, where the SAE has {own}.")
    named, text = asked.saes[0].sae.metadata.get("dataset_path"), asked.source.record().get("text")
    if not made.recipe_known and named and str(named) not in (text or ""):
        found.append(f"The SAE's files name the text {named}; the siblings read {text or 'the packaged text'}.")
    if made.buffer_rows is not None:
        found.append(
            f"The siblings read the text in one order, which is shuffled within {made.buffer_rows:,} tokens alone. "
            "Features may recur because of that order."
        )
    return found


def whole_batches(buffer_rows: int | None, config: TrainingConfig) -> int | None:
    """The buffer in whole batches, because it is filled again in place.

    Raises:
        BadInput: less than a batch.
    """
    if buffer_rows is None:
        return None
    if buffer_rows < config.batch_size:
        raise BadInput(f"--buffer-rows {buffer_rows}: at least a batch of {config.batch_size} expected")
    return buffer_rows - buffer_rows % config.batch_size


# ---------------------------------------------------------------------------------------------------------------------
# Forecast


@dataclass(frozen=True)
class Forecast:
    """Time, memory and disk of a run, by a measurement of a few steps on this machine."""

    saes: int
    """Siblings, and SAEs of Gaussian rows: as many, or one for each SAE where no sibling is trained."""
    tokens: int
    """Rows that each of them sees."""
    rows: int
    """Activations to harvest."""
    passes: int
    """Over the data, because not all SAEs fit into memory together."""
    harvest_seconds: float
    training_seconds: float
    rotation_seconds: float
    memory_bytes: int
    """Memory of the largest pass."""
    disk_bytes: int
    free_bytes: int

    def lines(self) -> list[str]:
        """The forecast as text."""
        seconds = self.harvest_seconds + self.training_seconds + self.rotation_seconds
        return [
            f"{self.saes} SAEs on {self.tokens:,} tokens each, {self.rows:,} different ones; "
            f"{self.passes} pass{'es' if self.passes > 1 else ''} over the data",
            f"time about {duration(seconds)}: activations {duration(self.harvest_seconds)}, training "
            f"{duration(self.training_seconds)}, rotations {duration(self.rotation_seconds)}",
            f"memory about {self.memory_bytes / 1e9:.1f} GB, disk about {self.disk_bytes / 1e9:.1f} GB "
            f"({self.free_bytes / 1e9:.0f} GB free)",
        ]


def forecast(
    asked: LoadedSAEs,
    made: SiblingPlan,
    artifact_root: Path,
    device: torch.device,
    siblings: int,
    rotations: int | None = None,
) -> Forecast:
    """Forecast of a plan. Times a few training steps, one batch of the model, and one product of two decoders.

    Args:
        siblings: all that the SAE is compared with. rotations: `recurrence.rotations_for`.
    """
    first, n = asked.saes[0].sae, len(made.grid)
    grid, config = (made.grid, made.config) if n else trained_alike(asked)
    trainings = 2 if n else 1  # of siblings and of SAEs of Gaussian rows, or of these alone
    rows = (made.rows or min(LANGUAGE_MODEL_ROWS, config.tokens)) if n else asked.store.rows
    read = rows + (config.tokens if made.buffer_rows else 0)
    sizes = memory.Sizes(first.d_in, first.d_out, config.batch_size, len(config.snapshot_steps()))
    passes = memory.passes(grid, sizes, device)
    step = _seconds_of_step([grid[i] for i in passes[0]], config, first.d_in, device)
    training = trainings * step * config.steps * len(grid) / len(passes[0])
    largest = max(sum(memory.state_bytes(grid[i], sizes, device) for i in p) for p in passes)

    checkpoint = FLOAT * first.d_sae * (first.d_in + first.d_out * (1 + sizes.snapshots))
    stores = trainings * FLOAT * rows * first.d_in
    artifact_root.mkdir(parents=True, exist_ok=True)
    return Forecast(
        saes=trainings * len(grid),
        tokens=config.tokens,
        rows=read,
        passes=trainings * len(passes),
        harvest_seconds=read * _seconds_of_token(asked, device) if n else 0.0,
        training_seconds=training,
        rotation_seconds=2
        * siblings
        * (rotations or rotations_for(first.d_sae))
        * _seconds_of_product(first.W_dec, device),
        memory_bytes=largest,
        disk_bytes=stores + trainings * len(grid) * checkpoint,
        free_bytes=shutil.disk_usage(artifact_root).free,
    )


def _seconds_of_step(members: list[Member], config: TrainingConfig, d_in: int, device: torch.device) -> float:
    """Median time of a step of a stack on Gaussian rows; the first step, which may compile, does not count."""
    settings = StepSettings(
        config.betas,
        config.weight_decay,
        config.aux_coefficient,
        config.dead_after_tokens,
        config.proposes(device, d_in),
        config.steps,
        config.freeze_decoder,
    )
    shape = Shape(d_in, d_in, members[0].d_sae)
    stack = Stack(members, shape, device, torch.float32, config.tied_init, None)
    x = torch.randn(config.batch_size, d_in, device=device).expand(len(members), -1, -1)
    times = []
    for i in range(TIMED_STEPS + 1):
        began = time.monotonic()
        stack.step(x, x, i, 1.0, settings)
        _wait(device)
        times.append(time.monotonic() - began)
    return sorted(times[1:])[TIMED_STEPS // 2]


def _seconds_of_token(asked: LoadedSAEs, device: torch.device) -> float:
    """Time of the model up to the hook, a token; the second of two batches."""
    subject, length = asked.subject, min(128, asked.subject.n_ctx)
    tokens = torch.randint(len(subject.tokenizer), (4, length)).numpy()
    for _ in range(2):
        began = time.monotonic()
        run(subject, [*tokens], [asked.hook_name])
        _wait(device)
    return (time.monotonic() - began) / tokens.size


def _seconds_of_product(W_dec: torch.Tensor, device: torch.device) -> float:
    """Time of the cosines of two decoders, from those of a part of one."""
    W = W_dec.to(device)
    part = W[: min(1024, len(W))]
    for _ in range(2):
        began = time.monotonic()
        (part @ W.T).amax(1)
        _wait(device)
    return (time.monotonic() - began) * len(W) / len(part)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


@dataclass(frozen=True)
class Other:
    """An SAE that the SAE is compared with."""

    label: str
    origin: Literal["trained", "supplied", "relative"]
    sha256: str
    W_dec: Tensor
    """`[d_sae, d_in]`."""
    sae: SAE | None
    """None for a relative, whose decoder alone is read."""
    heldout: Heldout | None

    @classmethod
    def of(cls, c: LoadedSAE, origin: Literal["trained", "supplied"]) -> Other:
        return cls(c.label, origin, c.record.checkpoint_sha256, c.sae.W_dec.float().cpu(), c.sae, c.record.heldout)


@dataclass(frozen=True)
class Group:
    """All that an SAE is compared with."""

    others: list[Other]
    gaussian: list[Tensor]
    """Decoders of SAEs of Gaussian rows, trained alike; none for relatives."""
    spectrum: Spectrum | None
    """Spectrum of the activations; None for relatives."""
    training: SiblingTraining | None
    """How the trained siblings were made."""
    withheld: str | None
    """Why nothing may be said to be missing."""
    inputs: dict[str, str]
    """Label -> sha256."""


def first_named(asked: LoadedSAEs, named: list[Path]) -> LoadedSAEs:
    """The SAEs under the names that a user gave them, the one that the command line names first in the first place."""
    folders = foreign.find_all(named[:1], "--checkpoint", asked.hook_name) if named else []
    ordered = sorted(asked.saes, key=lambda c: c.folder not in folders)
    names = loaded.names_of([c.folder for c in ordered])
    saes = [replace(c, record=c.record.model_copy(update={"label": names[c.folder]})) for c in ordered]
    return replace(asked, saes=saes)


def check(asked: LoadedSAEs) -> tuple[list[str], list[str]]:
    """(why these SAEs cannot certify each other's features, what a reader should know of them); sentences.

    Raises:
        BadInput: SAEs that differ in more than their seed, or one decoder twice.
    """
    if len(asked.saes) < 2:
        return [], []
    folders, saes = [c.folder for c in asked.saes], [c.sae for c in asked.saes]
    labels, decoders = [c.label for c in asked.saes], [s.W_dec for s in saes]
    refuse_unlike(labels, decoders)
    limits, notes = [], []
    heldout = [c.record.heldout for c in asked.saes]
    checks = (
        lambda: replicates.check("--checkpoint", folders, saes, heldout),
        lambda: independence.refuse_dependent(labels, decoders),
    )
    for one in checks:
        try:
            notes += one() or []
        except Dependent as error:
            limits.append(f"The SAEs are no independent trainings: {error}.")
    described = [c.sae.metadata.get("husai") or {} for c in asked.saes]
    orders = [m["order_seed"] for m in described if "order_seed" in m]
    if len(set(orders)) < len(orders):
        limits.append("The SAEs share an order of the data, therefore what recurs may be due to that order.")
    return limits, notes


def compared(
    asked: LoadedSAEs, made: SiblingPlan, cells: Cells, artifact_root: Path, device: torch.device, threads: int
) -> Group:
    """Train the siblings and as many SAEs of Gaussian rows; the user's further SAEs are siblings too.

    Raises:
        CheckFailed: the siblings miss the SAE's L0.
    """
    others = [Other.of(c, "supplied") for c in asked.saes[1:]]
    training, withheld = None, None
    if made.grid:
        store = store_of(asked, made, artifact_root, device, threads)
        trained, made = train(asked, made, store, cells, artifact_root, device, threads)
        others += [Other.of(c, "trained") for c in trained]
        recipe = _enough(made.grid, len(others)), made.config
        member, config = made.grid[0], made.config
        of_store = len(store.split(config.heldout_fraction)[0])
        training = SiblingTraining(
            family=member.family,
            d_sae=member.d_sae,
            k=member.k,
            tokens=config.tokens,
            rows=config.tokens if made.buffer_rows else min(config.tokens, of_store),
            learning_rate=member.learning_rate,
            batch_size=config.batch_size,
            recipe="the SAE's own" if made.recipe_known else "HUSAI's own, at the SAE's width and L0",
            recipe_tokens=made.recipe_tokens,
        )
        withheld = made.fewer_tokens or _fewer_rows(asked, made, store)
    else:
        recipe = trained_alike(asked)
        store = _own_store(asked, made.rows, artifact_root, device, threads)
    noise = controls.gaussian(artifact_root, store, *recipe, device, threads)
    mean, covariance = store.stats()
    inputs = asked.inputs() | {"activations": store.digest}
    inputs |= {f"checkpoint {o.label}": o.sha256 for o in others}
    return Group(
        others=others,
        gaussian=[d.W_dec for d in noise.dictionaries],
        spectrum=Spectrum.of(covariance, store.rows, mean),
        training=training,
        withheld=withheld,
        inputs=inputs,
    )


def _fewer_rows(asked: LoadedSAEs, made: SiblingPlan, store: ActivationStore) -> str | None:
    """Why siblings that see the rows of a store again and again cannot show that a feature is missing.

    An SAE of a stream saw each token once. The same is assumed of one whose recipe is not known.
    """
    once = not made.recipe_known or bool((asked.made or {}).get("streamed"))
    if not once or made.buffer_rows is not None or made.recipe_tokens is None or store.rows >= made.recipe_tokens:
        return None
    return (
        f"siblings were trained on a store of {store.rows:,} tokens, and the SAE saw {made.recipe_tokens:,}; "
        "--train-rows or --buffer-rows gives siblings more of them"
    )


def _enough(grid: list[Member], n: int) -> list[Member]:
    """At least n members, by further seeds: a permutation needs as many SAEs of Gaussian rows as siblings."""
    last = max(m.seed for m in grid)
    return [*grid, *(replace(grid[0], seed=last + i, order_seed=last + i) for i in range(1, n - len(grid) + 1))]


def _own_store(
    asked: LoadedSAEs, rows: int | None, artifact_root: Path, device: torch.device, threads: int
) -> ActivationStore:
    """The activations that the SAEs were trained on where they are at hand, else the held-out ones."""
    if asked.made is None:
        return asked.store
    try:
        return training_store(asked, artifact_root, rows, device, threads)
    except BadInput:
        return asked.store


def relatives(asked: LoadedSAEs, named: list[Path]) -> Group:
    """Other SAEs of the hook by their decoders alone: those that are named, or those of SAELens' catalogue.

    Raises:
        BadInput: none can be read, or one has another d_in.
    """
    own, names = asked.saes[0], named or _in_catalogue(asked)
    others, unread, seen = [], [], {own.record.checkpoint_sha256}
    with progress("reading relatives", len(names)) as advance:
        for path in foreign.find_all(names, "--relatives", asked.hook_name) if named else names:
            try:
                sae, sha256 = foreign.open_checkpoint(path), foreign.checkpoint_sha256(path)
            except BadInput as error:
                if named:
                    raise
                unread.append(str(error))
                continue
            finally:
                advance(1)
            if not named and sae.d_out != own.sae.d_out:
                unread.append(f"{path}: d_in {sae.d_out}; {own.sae.d_out} expected")
                continue
            if sha256 not in seen:  # releases of the catalogue share SAEs
                seen.add(sha256)
                others.append(Other(str(path), "relative", sha256, sae.W_dec.float().cpu(), None, None))
    if not others:
        why = f"; {unread[0]}" if unread else ""
        raise BadInput(f"--relatives: none of {len(names)} SAEs at {asked.hook_name} can be read{why}")
    if unread:
        log.warning("%d of %d relatives cannot be read: %s", len(unread), len(names), unread[0])
    refuse_unlike([own.label, *(o.label for o in others)], [own.sae.W_dec, *(o.W_dec for o in others)])
    inputs = asked.inputs() | {f"relative {o.label}": o.sha256 for o in others}
    return Group(others, [], None, None, "relatives are other trainings, of other width or L0", inputs)


def _in_catalogue(asked: LoadedSAEs) -> list[Path]:
    """Names of the catalogue's SAEs at the hook.

    Raises:
        BadInput: there are none.
    """
    model, hook = asked.subject.name, asked.hook_name
    try:
        listed = catalogue.listed(model)
    except BadInput:
        listed = []
    at_hook = [each for each in listed if each.hook is not None and same_place(each.hook, hook)]
    names = [Path(each.name) for each in at_hook if each.judged == "yes"]
    if not names:
        raise BadInput(
            f"--relatives: SAELens' catalogue has no SAE of {model} at {hook}; names or paths of SAEs expected"
        )
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Training


def store_of(
    asked: LoadedSAEs, made: SiblingPlan, artifact_root: Path, device: torch.device, threads: int
) -> ActivationStore:
    """The activations that siblings are trained on: those that the SAE names where they are at hand, else harvested."""
    if made.recipe_known and made.rows is None:
        try:
            return training_store(asked, artifact_root, None, device, threads)
        except BadInput:
            log.info("the activations that the SAE was trained on are not at hand; others are harvested, of --text")
    rows = made.rows or min(LANGUAGE_MODEL_ROWS, made.config.tokens)
    place = artifact_root, device, threads
    store = partial(open_store, *place, subject=asked.name, hook_name=asked.hook_name, rows=rows)
    return store(text=asked.source, harvesting=asked.said)


def train(
    asked: LoadedSAEs,
    made: SiblingPlan,
    store: ActivationStore,
    cells: Cells,
    artifact_root: Path,
    device: torch.device,
    threads: int,
) -> tuple[list[LoadedSAE], SiblingPlan]:
    """(the siblings, opened on the held-out activations; the plan that gave them).

    A penalised architecture can miss the SAE's L0. It is then trained once more, aimed as far to the other side.

    Raises:
        CheckFailed: the L0 of the siblings' mean is missed by more than 10 %.
    """
    target = asked.saes[0].record.heldout.l0
    for attempt in range(2):
        siblings = _trained(asked, made, store, cells, artifact_root, device, threads)
        reached = sum(s.record.heldout.l0 for s in siblings) / len(siblings)
        if same_l0(target, reached):
            return siblings, made
        k = min(made.grid[0].d_sae, max(1, round(made.grid[0].k * target / reached))) if reached else made.grid[0].k
        if attempt == 0 and k != made.grid[0].k:
            log.warning(
                "siblings reach an L0 of %.1f, the SAE has %.1f: trained again, aimed at %d", reached, target, k
            )
            made = replace(made, grid=[replace(m, k=k) for m in made.grid])
    raise CheckFailed(
        f"--siblings: they reach an L0 of {reached:.1f} on held-out tokens; the SAE has {target:.1f}, and 10 % more or "
        f"less is allowed; more --tokens than {made.config.tokens} may reach it"
    )


def _trained(
    asked: LoadedSAEs,
    made: SiblingPlan,
    store: ActivationStore,
    cells: Cells,
    artifact_root: Path,
    device: torch.device,
    threads: int,
) -> list[LoadedSAE]:
    if made.buffer_rows is None:
        trained = train_or_find(cells, store, made.grid, made.config, device, threads)
    else:
        hook, config = asked.hook_name, replace(made.config, window_rows=made.buffer_rows)
        inputs = Inputs.of(asked.subject, asked.source.training(), config.tokens, 0, artifact_root / "activations")
        stream = ActivationStream(asked.subject, [hook], inputs, made.buffer_rows)
        heldout = {hook: asked.store}
        trained = train_on_stream(cells, stream, heldout, made.grid, config, device, threads)
    folders = [cells.folder.parent / m.checkpoint for m in trained.members]
    opened = loaded.open_all(folders, asked.store, "siblings", asked.subject, artifact_root)
    names = {folder.resolve(): f"sibling {m.seed}" for folder, m in zip(folders, made.grid, strict=True)}
    return [replace(c, record=c.record.model_copy(update={"label": names[Path(c.folder).resolve()]})) for c in opened]
