"""Trains siblings of a user's SAE: SAEs of the same recipe, each with its own initialisation and data order."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from husai.activations.language_model import Inputs
from husai.activations.outliers import moments
from husai.activations.source import LANGUAGE_MODEL_ROWS, open_store
from husai.activations.store import ActivationStore
from husai.activations.stream import ActivationStream
from husai.dictionaries import catalogue, foreign, recipes
from husai.dictionaries.families import FAMILIES, family_of
from husai.dictionaries.sae import SAE
from husai.evals import loaded
from husai.evals.candidate import training_store
from husai.evals.loaded import LoadedSAE, LoadedSAEs
from husai.evals.random_model import LEARNING_RATE, PASSES, aim, gaussian_at_l0, gaussian_control, own_recipe
from husai.evidence.features import SiblingTraining
from husai.evidence.references import same_l0
from husai.evidence.schemas import Heldout
from husai.runs.cells import Cells
from husai.runs.errors import BadInput, CheckFailed, Dependent
from husai.runs.progress import progress
from husai.stability import controls, independence, replicates
from husai.stability.nulls import Spectrum
from husai.stability.recurrence import refuse_unlike
from husai.subjects.hooks import same_place
from husai.training.grid import train_on_stream, train_or_find
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig

log = logging.getLogger("husai")
DEFAULT = 14
"""Number of siblings of a single SAE. A feature that recurs in all 14 is certified at 0.8 (`rules.siblings_needed`)."""


@dataclass(frozen=True)
class SiblingPlan:
    """Recipe of the siblings."""

    grid: list[Member]
    config: TrainingConfig
    rows: int | None
    """Rows of the activation store to train on. None: the store that the SAE names."""
    buffer_rows: int | None
    """Rows of the buffer of a stream, in which siblings see each token once. None: siblings are trained on a store."""
    recipe_known: bool
    """Whether the SAE's files state its training."""
    recipe_tokens: int | None
    """Number of tokens that the SAE was trained on. None: its files do not state it."""

    @property
    def fewer_tokens(self) -> str | None:
        """Reason why siblings cannot show that a feature is missing; None if they can."""
        if self.recipe_tokens is None:
            return "the files of the SAE do not say how many tokens it was trained on"
        if self.config.tokens < self.recipe_tokens:
            return f"siblings saw {self.config.tokens:,} tokens, the SAE saw {self.recipe_tokens:,}"
        return None


def make_plan(
    user_saes: LoadedSAEs, siblings: int, tokens: int | None, rows: int | None, buffer_rows: int | None = None
) -> SiblingPlan:
    """Recipe of an SAE's siblings: the SAE's own if HUSAI trained it, else HUSAI's recipe at its width and L0.

    Args:
        siblings: number of SAEs to train.
        tokens: number of tokens that each sibling is trained on. None: as many as the SAE saw.
        rows: rows of the store. Siblings are trained on it, or Gaussian rows have its moments.
        buffer_rows: rows of the buffer of a stream. None: train on the store.

    Raises:
        BadInput: the SAE was pulled towards a reference, or has no active feature.
    """
    first = user_saes.saes[0]
    settings = recipes.settings_of(first.folder, first.sae)
    own_tokens = recipes.tokens_of(first.sae, settings)
    described = [c.sae.metadata.get("husai") or {} for c in user_saes.saes]
    taken = {m[name] for m in described for name in ("seed", "order_seed") if name in m}
    seeds = [s for s in range(1, siblings + len(taken) + 1) if s not in taken][:siblings]
    if (metadata := user_saes.training_metadata) is not None:
        if metadata.get("reference") is not None or metadata.get("assignment_weight"):
            raise BadInput(f"--checkpoint: {first.folder} was pulled towards a reference; an independent SAE expected")
        shape = {n: metadata[n] for n in ("d_sae", "k", "learning_rate", "family")}
        config = replace(user_saes.recipe, tokens=tokens or user_saes.recipe.tokens)
        grid = [Member(seed=s, order_seed=s, **shape) for s in seeds]
        return SiblingPlan(grid, config, rows, whole_batches(buffer_rows, config), True, own_tokens)

    refuse_dead(first)
    k = first.sae.k or max(1, round(first.record.heldout.l0))
    rows = rows or min(LANGUAGE_MODEL_ROWS, tokens or own_tokens or LANGUAGE_MODEL_ROWS)
    tokens = tokens or own_tokens or PASSES * rows
    config = own_recipe(tokens)
    grid = [Member(s, first.sae.d_sae, k, LEARNING_RATE, s, family_of(first.sae.architecture)) for s in seeds]
    return SiblingPlan(grid, config, rows, whole_batches(buffer_rows, config), False, own_tokens)


def refuse_dead(first: LoadedSAE) -> None:
    """Raise BadInput for an SAE without an active feature."""
    if first.record.heldout.l0 <= 0:
        raise BadInput(
            f"--checkpoint: no feature of {first.folder} fires on the held-out tokens; an alive SAE expected"
        )


def departures(user_saes: LoadedSAEs, plan: SiblingPlan) -> list[str]:
    """Sentences on how trained siblings differ from the SAE in more than their seed, or depend on each other."""
    if not plan.grid:
        return []
    sentences, architecture, family = [], user_saes.saes[0].sae.architecture, plan.grid[0].family
    if not plan.recipe_known and architecture != FAMILIES[family].ARCHITECTURE:
        sentences.append(f"The siblings have another architecture: {family}, where the SAE has {architecture}.")
    dataset, text = user_saes.saes[0].sae.metadata.get("dataset_path"), user_saes.source.record().get("text")
    if not plan.recipe_known and dataset and str(dataset) not in (text or ""):
        sentences.append(f"The SAE's files name the text {dataset}; the siblings read {text or 'the packaged text'}.")
    if plan.buffer_rows is not None:
        sentences.append(
            "The siblings read the text in one order, which is shuffled within "
            f"{plan.buffer_rows:,} tokens alone. Features may recur because of that order."
        )
    return sentences


def whole_batches(buffer_rows: int | None, config: TrainingConfig) -> int | None:
    """Rows of the buffer, rounded down to whole batches, because the buffer is refilled in place.

    Raises:
        BadInput: the buffer is smaller than a batch.
    """
    if buffer_rows is None:
        return None
    if buffer_rows < config.batch_size:
        raise BadInput(f"--buffer-rows {buffer_rows}: at least a batch of {config.batch_size} expected")
    return buffer_rows - buffer_rows % config.batch_size


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
    """None for a relative, because only its decoder is read."""
    heldout: Heldout | None

    @classmethod
    def of(cls, c: LoadedSAE, origin: Literal["trained", "supplied"]) -> Other:
        return cls(c.label, origin, c.record.checkpoint_sha256, c.sae.W_dec.float().cpu(), c.sae, c.record.heldout)


@dataclass(frozen=True)
class Group:
    """SAEs and nulls that the judged SAE is compared with."""

    others: list[Other]
    gaussian: list[Tensor]
    """Decoders of SAEs trained by the same recipe on Gaussian rows; empty for relatives."""
    spectrum: Spectrum | None
    """Spectrum of the activations; None for relatives."""
    training: SiblingTraining | None
    """Recipe of the trained siblings; None if none was trained."""
    withheld: str | None
    """Reason why no feature may be called missing; None if a feature may."""
    inputs: dict[str, str]
    """Label -> sha256."""


def first_named(user_saes: LoadedSAEs, paths: list[Path]) -> LoadedSAEs:
    """The SAEs under their user's names. The SAE that the command line names first comes first."""
    folders = foreign.find_all(paths[:1], "--checkpoint", user_saes.hook_name) if paths else []
    ordered = sorted(user_saes.saes, key=lambda c: c.folder not in folders)
    names = loaded.user_names([c.folder for c in ordered])
    saes = [replace(c, record=c.record.model_copy(update={"label": names[c.folder]})) for c in ordered]
    return replace(user_saes, saes=saes)


def check(user_saes: LoadedSAEs) -> tuple[list[str], list[str]]:
    """(reasons why these SAEs cannot certify each other's features, notes on the SAEs), as sentences.

    Raises:
        BadInput: SAEs differ in more than their seed, or two have the same decoder.
    """
    if len(user_saes.saes) < 2:
        return [], []
    folders, saes = [c.folder for c in user_saes.saes], [c.sae for c in user_saes.saes]
    labels, decoders = [c.label for c in user_saes.saes], [s.W_dec for s in saes]
    refuse_unlike(labels, decoders)
    limits, notes = [], []
    heldout = [c.record.heldout for c in user_saes.saes]
    checks = (
        lambda: replicates.check("--checkpoint", folders, saes, heldout),
        lambda: independence.refuse_dependent(labels, decoders),
    )
    for one in checks:
        try:
            notes += one() or []
        except Dependent as error:
            limits.append(f"The SAEs are no independent trainings: {error}.")
    described = [c.sae.metadata.get("husai") or {} for c in user_saes.saes]
    orders = [m["order_seed"] for m in described if "order_seed" in m]
    if len(set(orders)) < len(orders):
        limits.append("The SAEs share an order of the data, therefore features may recur because of that order.")
    return limits, notes


def compared(
    user_saes: LoadedSAEs,
    plan: SiblingPlan,
    cells: Cells,
    artifact_root: Path,
    device: torch.device,
    threads: int,
) -> Group:
    """Train the siblings and as many SAEs of Gaussian rows. Further SAEs of the user count as siblings too.

    Raises:
        CheckFailed: the siblings miss the SAE's L0.
    """
    others = [Other.of(c, "supplied") for c in user_saes.saes[1:]]
    training, withheld = None, None
    if plan.grid:
        store = store_of(user_saes, plan, artifact_root, device, threads)
        trained, plan = train(user_saes, plan, store, cells, artifact_root, device, threads)
        others += [Other.of(c, "trained") for c in trained]
        member, config = plan.grid[0], plan.config
        grid = _enough(plan.grid, len(others))
        place = artifact_root, store, grid, config
        if plan.recipe_known:
            noise = controls.gaussian(*place, device, threads)
        else:
            noise = gaussian_at_l0(*place, [user_saes.saes[0].record.heldout.l0] * len(grid), device, threads)
        of_store = len(store.split(config.heldout_fraction)[0])
        training = SiblingTraining(
            family=member.family,
            d_sae=member.d_sae,
            k=member.k,
            tokens=config.tokens,
            rows=config.tokens if plan.buffer_rows else min(config.tokens, of_store),
            learning_rate=member.learning_rate,
            batch_size=config.batch_size,
            recipe="the SAE's own" if plan.recipe_known else "HUSAI's own, at the SAE's width and L0",
            recipe_tokens=plan.recipe_tokens,
        )
        withheld = plan.fewer_tokens or _fewer_rows(user_saes, plan, store)
    else:
        store = _own_store(user_saes, plan.rows, artifact_root, device, threads)
        noise = gaussian_control(user_saes, store, artifact_root, device, threads)
    mean, covariance = moments(store)
    inputs = user_saes.inputs() | {"activations": store.digest}
    inputs |= {f"checkpoint {o.label}": o.sha256 for o in others}
    return Group(
        others=others,
        gaussian=[d.W_dec for d in noise.dictionaries],
        spectrum=Spectrum.of(covariance, store.rows, mean),
        training=training,
        withheld=withheld,
        inputs=inputs,
    )


def _fewer_rows(user_saes: LoadedSAEs, plan: SiblingPlan, store: ActivationStore) -> str | None:
    """Reason why siblings that see a store's rows repeatedly cannot show that a feature is missing; None if they can.

    An SAE that was trained on a stream saw each token once. SAEs of unknown recipe are assumed to have done so.
    """
    each_token_once = not plan.recipe_known or bool((user_saes.training_metadata or {}).get("streamed"))
    if (
        not each_token_once
        or plan.buffer_rows is not None
        or plan.recipe_tokens is None
        or store.rows >= plan.recipe_tokens
    ):
        return None
    return (
        f"siblings were trained on a store of {store.rows:,} tokens, and the SAE saw {plan.recipe_tokens:,}; "
        "--train-rows or --buffer-rows gives siblings more of them"
    )


def _enough(grid: list[Member], n: int) -> list[Member]:
    """A grid of at least n members, by further seeds: the permutation test needs as many Gaussian SAEs as siblings."""
    last = max(m.seed for m in grid)
    return [*grid, *(replace(grid[0], seed=last + i, order_seed=last + i) for i in range(1, n - len(grid) + 1))]


def _own_store(
    user_saes: LoadedSAEs, rows: int | None, artifact_root: Path, device: torch.device, threads: int
) -> ActivationStore:
    """Store of the activations that the SAEs were trained on, or the held-out store if they are not available.

    Raises:
        BadInput: `rows` do not give these activations.
    """
    if user_saes.training_metadata is None:
        return user_saes.store
    try:
        return training_store(user_saes, artifact_root, rows, device, threads)
    except BadInput:
        if rows is not None:
            raise
        log.info("Gaussian rows get the moments of held-out activations: the SAEs' training activations are not there")
        return user_saes.store


def relatives(user_saes: LoadedSAEs, given_names: list[Path]) -> Group:
    """Other SAEs of the hook, by their decoders alone: the named ones, or all in SAELens' catalogue.

    Raises:
        BadInput: no SAE can be read, or one has another d_in.
    """
    judged_sae, names = user_saes.saes[0], given_names or _in_catalogue(user_saes)
    others, unread, seen = [], [], {judged_sae.record.checkpoint_sha256}
    with progress("reading relatives", len(names)) as advance:
        for path in foreign.find_all(names, "--relatives", user_saes.hook_name) if given_names else names:
            try:
                sae, sha256 = foreign.open_checkpoint(path), foreign.checkpoint_sha256(path)
            except BadInput as error:
                if given_names:
                    raise
                unread.append(str(error))
                continue
            finally:
                advance(1)
            if not given_names and sae.d_out != judged_sae.sae.d_out:
                unread.append(f"{path}: d_in {sae.d_out}; {judged_sae.sae.d_out} expected")
                continue
            if sha256 not in seen:  # releases of the catalogue share SAEs
                seen.add(sha256)
                others.append(Other(str(path), "relative", sha256, sae.W_dec.float().cpu(), None, None))
    if not others:
        why = f"; {unread[0]}" if unread else ""
        raise BadInput(f"--relatives: none of {len(names)} SAEs at {user_saes.hook_name} can be read{why}")
    if unread:
        log.warning("%d of %d relatives cannot be read: %s", len(unread), len(names), unread[0])
    refuse_unlike([judged_sae.label, *(o.label for o in others)], [judged_sae.sae.W_dec, *(o.W_dec for o in others)])
    inputs = user_saes.inputs() | {f"relative {o.label}": o.sha256 for o in others}
    return Group(others, [], None, None, "relatives are other trainings, of other width or L0", inputs)


def _in_catalogue(user_saes: LoadedSAEs) -> list[Path]:
    """Names of the catalogue's SAEs at the hook.

    Raises:
        BadInput: the catalogue has none.
    """
    model, hook = user_saes.subject.name, user_saes.hook_name
    try:
        entries = catalogue.listed(model)
    except BadInput:
        entries = []
    at_hook = [each for each in entries if each.hook is not None and same_place(each.hook, hook)]
    names = [Path(each.name) for each in at_hook if each.judged == "yes"]
    if not names:
        raise BadInput(
            f"--relatives: SAELens' catalogue has no SAE of {model} at {hook}; names or paths of SAEs expected"
        )
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Training


def store_of(
    user_saes: LoadedSAEs, plan: SiblingPlan, artifact_root: Path, device: torch.device, threads: int
) -> ActivationStore:
    """Store that siblings are trained on: the one that the SAE names if it is available, else a harvested one."""
    if plan.recipe_known and plan.rows is None:
        try:
            return training_store(user_saes, artifact_root, None, device, threads)
        except BadInput:
            log.info("the activations that the SAE was trained on are not available; others are harvested, of --text")
    rows = plan.rows or min(LANGUAGE_MODEL_ROWS, plan.config.tokens)
    place = artifact_root, device, threads
    store = partial(open_store, *place, subject=user_saes.name, hook_name=user_saes.hook_name, rows=rows)
    return store(text=user_saes.source, harvesting=user_saes.harvesting)


def train(
    user_saes: LoadedSAEs,
    plan: SiblingPlan,
    store: ActivationStore,
    cells: Cells,
    artifact_root: Path,
    device: torch.device,
    threads: int,
) -> tuple[list[LoadedSAE], SiblingPlan]:
    """(the siblings, opened on the held-out activations; the plan by which they were trained).

    Architectures with a sparsity penalty can miss the SAE's L0. They are trained once more with a corrected target.

    Raises:
        CheckFailed: the siblings' mean L0 differs from the SAE's by more than 10 %.
    """
    target = user_saes.saes[0].record.heldout.l0
    for attempt in range(2):
        siblings = _trained(user_saes, plan, store, cells, artifact_root, device, threads)
        reached = sum(s.record.heldout.l0 for s in siblings) / len(siblings)
        if same_l0(target, reached):
            return siblings, plan
        grid = [aim(m, target, reached) for m in plan.grid]
        if attempt == 0 and grid != plan.grid:
            aimed = grid[0].k
            log.warning(
                "siblings reach an L0 of %.1f, the SAE has %.1f: trained again, aimed at %d", reached, target, aimed
            )
            plan = replace(plan, grid=grid)
    raise CheckFailed(
        f"--siblings: they reach an L0 of {reached:.1f} on held-out tokens; the SAE has {target:.1f}, and 10 % more or "
        f"less is allowed; more --tokens than {plan.config.tokens} may reach it"
    )


def _trained(
    user_saes: LoadedSAEs,
    plan: SiblingPlan,
    store: ActivationStore,
    cells: Cells,
    artifact_root: Path,
    device: torch.device,
    threads: int,
) -> list[LoadedSAE]:
    if plan.buffer_rows is None:
        trained = train_or_find(cells, store, plan.grid, plan.config, device, threads)
    else:
        hook, config = user_saes.hook_name, replace(plan.config, window_rows=plan.buffer_rows)
        inputs = Inputs.of(
            user_saes.subject, user_saes.source.training(), config.tokens, 0, artifact_root / "activations"
        )
        stream = ActivationStream(user_saes.subject, [hook], inputs, plan.buffer_rows)
        heldout = {hook: user_saes.store}
        trained = train_on_stream(cells, stream, heldout, plan.grid, config, device, threads)
    folders = [cells.folder.parent / m.checkpoint for m in trained.members]
    opened = loaded.open_all(folders, user_saes.store, "siblings", user_saes.subject, artifact_root)
    names = {folder.resolve(): f"sibling {m.seed}" for folder, m in zip(folders, plan.grid, strict=True)}
    return [replace(c, record=c.record.model_copy(update={"label": names[Path(c.folder).resolve()]})) for c in opened]
