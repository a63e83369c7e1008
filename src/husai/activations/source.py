"""Opens the activations of a phase: a given store, or a store harvested from a subject."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from husai.activations.harvest import check_modular_addition, harvest_modular_addition
from husai.activations.outliers import without_outliers
from husai.activations.store import ActivationStore
from husai.runs.subjects import is_language_model
from husai.subjects import modular_addition
from husai.subjects.harvesting import Harvesting
from husai.subjects.modular_addition import ModularAdditionConfig
from husai.subjects.sources import TextSource

DEFAULT_HOOK = "blocks.0.hook_resid_post"
LANGUAGE_MODEL_HOOK = "blocks.1.hook_resid_pre"
LANGUAGE_MODEL_ROWS = 1_000_000


def open_store(
    artifact_root: Path,
    device: torch.device,
    threads: int,
    store: Path | None = None,
    subject: str | Path | None = None,
    hook_name: str | None = None,
    position: int | None = None,
    config: ModularAdditionConfig | None = None,
    rows: int | None = None,
    random_seed: int | None = None,
    text: TextSource | None = None,
    harvesting: Harvesting | None = None,
) -> ActivationStore:
    """Open or harvest the store of a phase.

    Args:
        store: folder of a store. None: activations of `subject` are found below `artifact_root`, or harvested.
        subject: folder of a trained transformer, or folder or name of a language model. None: a modular-addition
            transformer is found, or trained by `config`.
        hook_name: hook of the rows. None: the store's hook, or the default hook of the kind of subject.
        position: token position, for modular addition. None: the position of "=".
        rows: number of rows, for language models, from training documents of `text`. None: LANGUAGE_MODEL_ROWS.
        random_seed: seed of the random weights that replace the subject's. None: the subject's own weights.
        text: text source. None: the packaged text, whose training documents husai-tiny was trained on.
        harvesting: how the activations of a language model are made, as the files of SAEs state, and the norm above
            which rows of any subject are left out.

    Raises:
        BadInput: the store is damaged, or has another subject or hook.
    """
    multiple = harvesting and harvesting.max_norm_multiple

    def within(opened: ActivationStore) -> ActivationStore:
        return without_outliers(opened, multiple, artifact_root / "activations") if multiple else opened

    if store is not None:
        return within(ActivationStore.open(store, None if subject is None else _digest(subject), hook_name))
    if is_language_model(subject):
        model = str(subject), random_seed, device, harvesting
        return _of_language_model(artifact_root, threads, model, hook_name, rows, text or TextSource())
    config = config or ModularAdditionConfig()
    if subject is None:
        if hook_name not in (None, DEFAULT_HOOK):  # refuse an unknown hook before training
            check_modular_addition(config, [hook_name])
        subject = modular_addition.train_or_find(config, artifact_root / "subjects", device, threads)
    folder = harvest_modular_addition(
        Path(subject),
        artifact_root / "activations",
        hook_name or DEFAULT_HOOK,
        position,
        device=device,
        threads=threads,
        require_solved=config.epochs > 0,
        random_seed=random_seed,
    )
    return within(ActivationStore.open(folder))


def of_arguments(args: argparse.Namespace, device: torch.device) -> ActivationStore:
    """Store that a phase's command line names (`evals.flags.EvalParser.add_source`)."""
    named = {"store": args.activation_cache_dir, "subject": args.subject, "hook_name": args.hook_name}
    way = Harvesting(max_norm_multiple=args.max_norm_multiple)
    return open_store(args.artifact_root, device, args.threads, **named, rows=args.rows, text=args.text, harvesting=way)


def _digest(subject: str | Path) -> str:
    if not is_language_model(subject):
        return modular_addition.describe(Path(subject))["digest"]
    from husai.subjects import pretrained

    return pretrained.digest_of(subject)


def _of_language_model(
    artifact_root: Path,
    threads: int,
    model: tuple[str, int | None, torch.device, Harvesting | None],
    hook_name: str | None,
    rows: int | None,
    text: TextSource,
) -> ActivationStore:
    from husai.activations.language_model import harvest_tokens
    from husai.subjects import pretrained

    hook = hook_name or LANGUAGE_MODEL_HOOK
    folders = harvest_tokens(
        pretrained.load(*model),
        [hook],
        text.training(),
        artifact_root / "activations",
        rows or LANGUAGE_MODEL_ROWS,
        threads=threads,
    )
    return ActivationStore.open(folders[hook])
