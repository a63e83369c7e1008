"""Measures how probes on an SAE's features lose accuracy under a shift of the data, relative to the model's own probes.

A probe is trained on a data set's training rows by sae-probes' own functions. It is scored on the data set's test rows,
where its figure is the official one, and on the shifted version of the data set. HUSAI reads shifted versions itself:
sae-probes' reader looks for files that the package lacks, and numbers the classes of each file separately.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from husai.activations.language_model import harvest_prompts
from husai.activations.probes import auc_interval, delong
from husai.evals import sae_probes, shift
from husai.evals.loaded import LoadedSAEs, Places, to_saelens
from husai.evals.sae_probes_exact import ProbeSplit, auc, one_thread
from husai.evidence import data_sets, deltas, drop, rules
from husai.evidence.schemas import OODStress, ProbingName, Shifted, ShiftedSAE
from husai.runs.cells import Cells
from husai.runs.code import code_version
from husai.runs.errors import BadInput
from husai.runs.files import digest, sha256_file
from husai.runs.progress import progress
from husai.subjects import text
from husai.subjects.pretrained import quiet


@dataclass(frozen=True)
class Chosen:
    """Data sets that are probed."""

    shifted: list[str]
    """Data sets whose shifted versions are used."""
    skipped: dict[str, str]
    """Shifted version that is not used -> the reason."""
    probe: list[str]
    """Data sets outside the held-out family. Empty: the held-out family is left out too."""
    heldout: list[str]
    seed: int = 42


def choose(shifted: list[str] | None, probe: list[str], seed: int) -> Chosen:
    """Check the data sets that the command line names.

    Args:
        shifted: shifted versions; None for all usable ones. probe: [] leaves the held-out family out.

    Raises:
        BadInput: a name is unknown, a shifted version cannot be used, or a data set is training text.
    """
    known = data_sets.FAMILIES["ood"]["shifted"]
    for name in shifted or []:
        if name not in known:
            raise BadInput(f"--shifted {name}: of {', '.join(known)} expected")
    skipped = unusable(known)
    if bad := [name for name in shifted or [] if name in skipped]:
        raise BadInput(f"--shifted {bad[0]}: {skipped[bad[0]]}")
    used = [original(name) for name in shifted or known if name not in skipped]
    if not used:
        raise BadInput(f"no shifted version can be used: {'; '.join(f'{n}: {why}' for n, why in skipped.items())}")
    binary = set(text.binary_sets())
    heldout = [n for n in data_sets.FAMILIES["ood"]["code_and_ag_news"] if n in binary] if probe else []
    probe = sae_probes.check_data_sets([*probe, *heldout])[: -len(heldout)] if probe else []
    return Chosen(used, skipped, probe, heldout, seed)


def original(shifted: str) -> str:
    """Name of the data set that was shifted."""
    return shifted.removesuffix("_OOD")


def unusable(shifted: list[str]) -> dict[str, str]:
    """Name of each unusable shifted version -> the reason: its original is training text, or its labels differ."""
    reasons = {}
    try:
        sae_probes.check_data_sets([original(name) for name in shifted])
        doubtful = []
    except BadInput:
        doubtful = shifted  # each by itself
    for name in shifted:
        try:
            if name in doubtful:
                sae_probes.check_data_sets([original(name)])
            classes(name)
        except BadInput as error:
            reasons[name] = str(error).split(": ", 1)[1]
    return reasons


def classes(shifted: str) -> np.ndarray:
    """Class of each prompt of a shifted version, 0 or 1, numbered as in the original data set.

    Raises:
        BadInput: its labels differ from the original's, and the classes cannot be identified.
    """
    shifted_labels, original_labels = (text.table(name)["target"] for name in (shifted, original(shifted)))
    number = {str(label): i for i, label in enumerate(np.unique(original_labels))}
    if set(map(str, shifted_labels)) != set(number):
        labels = " and ".join(sorted(map(str, set(shifted_labels))))
        raise BadInput(
            f"{shifted}: its labels are {labels}; {' and '.join(number)} expected, as in {original(shifted)}"
        )
    return np.array([number[str(label)] for label in shifted_labels])


def unseen(shifted: str) -> np.ndarray:
    """True for prompts that the original data set lacks, bool `[prompts]`. No probe was trained on them."""
    known = set(text.documents(original(shifted)))
    return np.array([prompt not in known for prompt in text.documents(shifted)])


# ---------------------------------------------------------------------------------------------------------------------
# Probes of one data set


@dataclass(frozen=True)
class Prompts:
    """Place of the prompts' activations, and settings of their split."""

    model_name: str
    hook_name: str
    cache: str
    device: str = "cpu"
    seed: int = 42
    probing: ProbingName = sae_probes.OFFICIAL
    """Name of the probe implementation, one of sae_probes.PROBINGS."""

    def shifted(self, data_set: str) -> tuple[torch.Tensor, np.ndarray]:
        """(activations `[prompts, d_in]`, classes `[prompts]`) of the shifted version's unseen prompts."""
        name = f"{data_set}_OOD"
        folder = Path(self.cache) / f"model_activations_{self.model_name}_OOD"
        x, kept = torch.load(folder / f"{name}_{self.hook_name}.pt", weights_only=True), unseen(name)
        return x[torch.from_numpy(kept)], classes(name)[kept]


def of_sae(encoder, data_set: str, prompts: Prompts, ks: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """k -> {"id", "ood"}: test AUC of the probe on k features, on the data set's test rows and on the shifted version.

    Features are ranked and the probe is fitted on the training rows of the data set, as `sae_probes.run_sae_evals` does
    for `normal`, `l1`.

    Args:
        encoder: object with `encode`: `[rows, d_in]` -> `[rows, features]`.
    """
    place = prompts.model_name, prompts.hook_name, prompts.cache, prompts.seed, prompts.device
    with quiet(), one_thread():
        split = ProbeSplit.of(encoder, data_set, *place)
    raw, y = prompts.shifted(data_set)
    with torch.inference_mode():
        shifted = encoder.encode(raw.to(prompts.device)).cpu().float()
    figures = {}
    for k in ks:
        x_test, x_shifted = split.chosen(split.x_test, k), split.chosen(shifted, k)
        if prompts.probing == sae_probes.EXACT:
            with one_thread():
                probe = split.probe(k)
            original_auc = float(auc(probe.scores(x_test.numpy()), split.y_test.numpy()))
            figures[str(k)] = _figures(original_auc, probe.scores(x_shifted.numpy()), y)
        else:
            x_train = split.chosen(split.x_train, k)
            settings = {"penalty": "l1", "seed": prompts.seed}
            figures[str(k)] = fit(x_train, split.y_train, x_test, split.y_test, x_shifted, y, **settings)
    return figures


def of_llm(data_set: str, prompts: Prompts) -> dict[str, float]:
    """{"id", "ood", "ood_low"} of a logistic probe on the activations, fitted as in `sae_probes.run_baseline_evals`."""
    with quiet():
        from sae_probes.utils_data import get_dataset_sizes, get_xy_traintest

    rows = min(get_dataset_sizes()[data_set] - 100, 1024)
    place = prompts.hook_name, prompts.model_name, prompts.cache
    x_train, y_train, x_test, y_test = get_xy_traintest(rows, data_set, *place, seed=prompts.seed)
    x_shifted, y_shifted = prompts.shifted(data_set)
    return fit(x_train, y_train, x_test, y_test, x_shifted, y_shifted, seed=prompts.seed)


def fit(x_train, y_train, x_test, y_test, x_shifted, y_shifted, **settings) -> dict[str, float]:
    """Fit a probe by sae-probes' own code, in one thread as in its workers.

    Returns:
        {"id", "ood": test AUC, "ood_low": lower end of the 95 % interval (DeLong) of "ood"}
    """
    from sae_probes.utils_training import find_best_reg

    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        fitted = find_best_reg(x_train, y_train, x_test, y_test, **settings)
        scores = fitted.classifier.predict_proba(x_shifted)[:, 1]
    return _figures(fitted.metrics.test_auc, scores, y_shifted)


def _figures(original_auc: float, shifted: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """{"id", "ood", "ood_low"} from the original AUC and the probe's scores `[prompts]` of the shifted version."""
    estimate, error = delong(shifted[y == 1], shifted[y == 0])
    return {"id": original_auc, "ood": estimate, "ood_low": auc_interval(estimate, error)[0]}


def by_data_set(figures: list[dict[str, float]], names: tuple[str, ...] = ("id", "ood")) -> dict[str, list[float]]:
    """Name of a figure -> its values, one for each data set."""
    return {name: [f[name] for f in figures] for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# The stress test


def evaluate(
    tested: LoadedSAEs, chosen: Chosen, probing: ProbingName, ks: tuple[int, ...], places: Places, cells: Cells
) -> OODStress:
    """Results of the phase.

    Args:
        probing: name of the probe implementation, one of `sae_probes.PROBINGS`.
        ks: numbers of features of a probe. The rule reads `deltas.K`, which was fixed in advance.

    Raises:
        BadInput: the SAEs have several conditions.
        CheckFailed: sae-probes' own code failed.
    """
    subject, hook_name, group = tested.subject, tested.hook_name, tested.group
    versions = [f"{name}_OOD" for name in chosen.shifted]
    cache = places.probe_activations(subject)
    harvest_prompts(subject, [hook_name], [*chosen.shifted, *versions, *chosen.probe, *chosen.heldout], cache)
    encoders = [
        str(to_saelens(c.sae, subject, hook_name, places.output_dir / "encoders" / c.label)) for c in tested.saes
    ]
    prompts = Prompts(subject.name, hook_name, str(cache), places.device, chosen.seed, probing)
    shifted = on_shifted(tested, chosen, prompts, encoders, ks, cells)
    store = shift.shifted_store(subject, hook_name, versions, places.artifact_root, places.threads)
    inputs = {"shifted activations": store.digest}
    inputs["probed texts"] = digest(
        {n: sha256_file(text.path_of(n)) for n in (*chosen.shifted, *versions, *chosen.probe, *chosen.heldout)}
    )
    return OODStress(
        phase="ood_stress",
        inputs=tested.inputs() | inputs,
        subject=tested.name,
        candidate=group,
        rule={"max_drop": rules.OOD.threshold},
        shifted=shifted,
        families=on_families(tested, chosen, prompts, encoders, places) if chosen.probe else None,
        activations=shift.activations(tested, store, cells, places.threads),
        probing=probing,
        versions=sae_probes.versions(probing),
        skipped=chosen.skipped,
        **tested.source.record(),
    )


def on_shifted(
    tested: LoadedSAEs, chosen: Chosen, prompts: Prompts, encoders: list[str], ks: tuple[int, ...], cells: Cells
) -> Shifted:
    """AUC of the SAEs' and the model's probes on the test rows of each data set and on its shifted version."""
    names = chosen.shifted
    key: dict[str, Any] = {"subject": tested.subject.activations_digest, "data_sets": names}
    key |= {"hook_name": prompts.hook_name}
    key |= {"seed": prompts.seed, "device": prompts.device, "versions": sae_probes.versions(prompts.probing)}
    key["probing"] = prompts.probing
    key["code"] = code_version(of_sae)
    with progress("probes under shift (data sets)", (1 + len(encoders)) * len(names)) as advance:

        def of_each(probe) -> list:
            records = []
            for name in names:
                records.append(probe(name))
                advance(1)
            return records

        def compute_llm() -> tuple[dict, list[Path]]:
            figures = of_each(lambda name: of_llm(name, prompts))
            return by_data_set(figures, ("id", "ood", "ood_low")), []

        llm = cells.get("shifted-llm", key, compute_llm)
        records = []
        for c, folder in zip(tested.saes, encoders, strict=True):

            def compute(folder=folder) -> tuple[dict, list[Path]]:
                with quiet():  # of settings of the model, which are applied already
                    from sae_lens import SAE

                    encoder = SAE.load_from_disk(folder, device=prompts.device)
                figures = of_each(lambda name: of_sae(encoder, name, prompts, ks))
                return {str(k): by_data_set([f[str(k)] for f in figures]) for k in ks}, []

            auc = cells.get("shifted", key | {"sae": c.identity, "ks": list(ks)}, compute)
            records.append(ShiftedSAE(identity=c.identity, seed=c.facts.seed, test_auc=auc))
    shifted = Shifted(
        data_sets=names,
        families=data_sets.families(names),
        prompts=[int(unseen(f"{name}_OOD").sum()) for name in names],
        k=deltas.K,
        random_seed=prompts.seed,
        llm=llm,
        saes=records,
        drop={},
        drop_where_kept={},
    )
    lost = {"drop": drop.drop(shifted), "drop_where_kept": drop.drop_where_kept(shifted)}
    return shifted.model_copy(update=lost)


def on_families(tested: LoadedSAEs, chosen: Chosen, prompts: Prompts, encoders: list[str], places: Places) -> dict:
    """Probe the SAEs and the model on probe sets and on the held-out family, by sae-probes' workers."""
    names = chosen.probe, chosen.heldout
    settings = sae_probes.Settings(
        *(
            tested.subject.activations_digest,
            prompts.model_name,
            prompts.hook_name,
            (*names[0], *names[1]),
            (int(deltas.K),),
        ),
        probing=prompts.probing,
    )
    machine = {"cache": prompts.cache, "root": str(places.artifact_root / "probes"), "device": places.device}
    llm_digest = tested.subject.activations_digest
    tasks = [sae_probes.ProbeTask("llm", "llm", None, llm_digest, prompts.seed, settings, **machine)]
    for c, path in zip(tested.saes, encoders, strict=True):
        tasks.append(sae_probes.ProbeTask(c.label, "sae", path, c.identity, prompts.seed, settings, **machine))
    llm, *saes = sae_probes.run(tasks, places.threads, places.output_dir / "workers", places.force)
    split = len(chosen.probe)

    def sides(auc: list[float]) -> dict[str, list[float]]:
        return {"id": auc[:split], "ood": auc[split:]}

    results: dict = {
        side: {"data_sets": n, "families": data_sets.families(n)} for side, n in zip(("id", "ood"), names, strict=True)
    }
    results |= {"k": deltas.K, "llm": sides(llm["llm"]["test_auc"])}
    results["saes"] = [
        {"identity": c.identity, "seed": c.facts.seed, "test_auc": sides(figures[deltas.K]["test_auc"])}
        for c, figures in zip(tested.saes, saes, strict=True)
    ]
    return results | {"gap": drop.gap(results)}
