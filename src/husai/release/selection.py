"""Selection of the release candidate among the conditions of the studies: a pure function of their results.

A candidate is a condition: SAEs that differ only in their seed. Its score is the lower end of 95 % intervals on
a third of the data-set families. The gate reads the other families, and fresh seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from husai.evidence import conditions, deltas, references
from husai.evidence.data_sets import third
from husai.evidence.levels import CONFIRMATION_SEEDS
from husai.evidence.names import GATED_NULLS, PRIMARY_SCORE
from husai.evidence.schemas import (
    Bank,
    ConditionSection,
    Contrastive,
    Figures,
    Interval,
    PairRecord,
    PairScores,
    ProbedRecord,
    Probing,
    Reference,
    ScoredRecord,
    SeedGroup,
    Strict,
    refusal,
)
from husai.runs.errors import BadInput
from husai.runs.files import digest

STUDIES = ("architecture_frontier", "external_metric_scaling")
SCALES = {"saebench": 0.05, "cebench": 0.1, "stability": 0.25, "train_ev": 0.25}
"""One unit of each figure. It is fixed, therefore other candidates do not change a score."""
EXTERNAL = ("saebench", "cebench")

F = TypeVar("F", bound=Figures)


@dataclass(frozen=True)
class Rules:
    """Settings of the ranking of candidates."""

    weights: dict[str, float]
    """Weight of each figure in SCALES."""
    min_seeds: int = 3
    uncertainty: str = "lcb"
    """`lcb`: lower ends of intervals; `point`: estimates."""
    require_both_external: bool = False
    confirmation_seeds: int = CONFIRMATION_SEEDS
    """Number of fresh seeds of the confirmation."""


@dataclass(frozen=True)
class Study:
    """Results of a frontier or scaling study."""

    label: str
    sha256: str
    results: Any


@dataclass(frozen=True)
class Cohort:
    """Facts that comparable rows share, taken from the first consistent bank."""

    subject_digest: str
    data_sets: list[str] | None
    probing_seed: int | None
    probing: str | None
    versions: dict[str, str] | None
    benchmark: str | None
    pairs_digest: str | None

    @classmethod
    def of(cls, bank: Bank) -> Cohort:
        probing, pairs = bank.saebench, bank.cebench
        return cls(
            subject_digest=bank.inputs["subject"],
            data_sets=None if probing is None else probing.data_sets,
            probing_seed=None if probing is None else probing.random_seed,
            probing=None if probing is None else probing.probing,
            versions=None if probing is None else probing.versions,
            benchmark=None if pairs is None else pairs.benchmark,
            pairs_digest=None if pairs is None else pairs.pairs_digest,
        )

    def to_json(self) -> dict:
        """Fields; `probing` only where it is not sae-probes' own code, because older evidence knows no other."""
        return {k: v for k, v in vars(self).items() if k != "probing" or v not in (None, "sae_probes")}

    def differs(self, other: Cohort) -> str | None:
        """Why rows of another bank are not comparable; None if they are."""
        for name, what in (
            ("subject_digest", "another subject"),
            ("data_sets", "other probing data sets"),
            ("probing_seed", "another probing seed"),
            ("probing", "probes of another name"),
            ("versions", "other versions of the benchmark's packages"),
            ("benchmark", "another contrastive benchmark"),
            ("pairs_digest", "other story pairs"),
        ):
            if getattr(self, name) != getattr(other, name):
                return f"{what} than the first bank"
        return None


def on_families(probing: Probing, families: set[str], inside: bool) -> Probing:
    """The probing on the data sets of these families alone, or on the others."""
    keep = [i for i, f in enumerate(probing.families) if (f in families) == inside]

    def cut(records: list[F]) -> list[F]:
        return [r.model_copy(update={"test_auc": {k: _at(keep, v) for k, v in r.test_auc.items()}}) for r in records]

    return probing.model_copy(
        update={
            "data_sets": _at(keep, probing.data_sets),
            "families": _at(keep, probing.families),
            "saes": cut(probing.saes),
            "controls": cut(probing.controls),
            "baselines": dict(zip(probing.baselines, cut([*probing.baselines.values()]), strict=True)),
        }
    )


def on_clusters(pairs: Contrastive, clusters: set[str], inside: bool) -> Contrastive:
    """The contrastive score on the pairs of these clusters alone, or on the others."""
    keep = [i for i, c in enumerate(pairs.clusters) if (c in clusters) == inside]

    def cut(records: list[PairScores | Reference]) -> list[PairScores | Reference]:
        return [r.model_copy(update={"normalised_of_pairs": _at(keep, r.normalised_of_pairs)}) for r in records]

    scored = {name: cut(getattr(pairs, name)) for name in ("saes", "controls", "untrained", "references")}
    return pairs.model_copy(update={"clusters": _at(keep, pairs.clusters), **scored})


def _at(places: list[int], values: list) -> list:
    return [values[i] for i in places]


def differences(bank: Bank, families: Iterable[str], inside: bool = True) -> dict[str, dict[str, dict]]:
    """{benchmark: {condition: the difference to its matched reference}} on these families, or on the others."""
    chosen, rows = set(families), {}
    if bank.saebench is not None and (probing := on_families(bank.saebench, chosen, inside)).data_sets:
        rows["saebench"] = deltas.saebench(probing)
    if bank.cebench is not None and (pairs := on_clusters(bank.cebench, chosen, inside)).clusters:
        rows["cebench"] = deltas.contrastive(pairs)
    return {name: {row["condition"]: row["delta"]["reference"] for row in found} for name, found in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What of a study can be read


def cleaned(bank: Any) -> tuple[Bank | None, dict[str, str]]:
    """(the bank without records that are not what they should be, {condition: why it lost one}); (None, {"": why})
    where the rest does not hold together."""
    bank = copy.deepcopy(bank)
    damaged: dict[str, str] = {}
    try:
        parts: list[tuple[Any, type[Strict]]] = [(bank, ScoredRecord)]
        parts += [(bank["saebench"], ProbedRecord), (bank["cebench"], PairRecord)]
        for owner, model in ((o, m) for o, m in parts if o is not None):
            for i in reversed(range(len(owner["saes"]))):
                try:
                    model.model_validate(owner["saes"][i])
                except ValidationError as error:
                    record = owner["saes"].pop(i)
                    damaged.setdefault(str(record["condition"]), f"{record['label']}: {refusal(error)}")
                    if "untrained" in owner:
                        del owner["untrained"][i]
        for section in list(bank["sections"]):
            try:
                ConditionSection.model_validate(section)
            except ValidationError as error:
                bank["sections"].remove(section)
                damaged.setdefault(f"{section['family']} d{section['d_sae']} k{section['k']}", refusal(error))
        return Bank.model_validate(bank), damaged
    except ValidationError as error:
        return None, {"": refusal(error)}
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return None, {"": f"it is no bank of a study ({type(error).__name__}: {error})"}


# ---------------------------------------------------------------------------------------------------------------------
# Selection


def select(studies: list[Study], rules: Rules) -> dict:
    """The results of a selection.

    Returns:
        {"rules", "cohort", "split": families that were read, and those that are left for the gate,
        "candidates": rows with figures and score, best first; "excluded": [{"study", "condition", "reason"}]; "front":
        conditions that no other surpasses in all figures; "seeds_used"; "confirmation_seeds"; "selected": a candidate,
        or None}
    """
    banks, excluded = [], []
    seeds_used: set[int] = set()
    for study in studies:
        found = study.results.get("banks") if isinstance(study.results, dict) else None
        seeds_used |= _seeds_in(found if isinstance(found, list) else None)
        if not isinstance(found, list) or study.results.get("phase") not in STUDIES:
            excluded.append(_out(study, None, "it is no result of a frontier or scaling study"))
            continue
        for i, raw in enumerate(found):
            usable, reasons = cleaned(raw)
            excluded += [_out(study, name or f"bank {i}", why) for name, why in reasons.items()]
            if usable is not None:
                banks.append((study, usable, set(reasons)))
    cohort = Cohort.of(banks[0][1]) if banks else None
    comparable = []
    for study, bank, damaged in banks:
        if cohort is not None and (why := cohort.differs(Cohort.of(bank))):
            excluded += [_out(study, row["condition"], why) for row in bank.conditions]
        else:
            comparable.append((study, bank, damaged))

    split = _split([bank for _, bank, _ in comparable])
    candidates: list[dict] = []
    for study, bank, damaged in comparable:
        found, lost = _rows(study, bank, damaged, split["selection_families"], rules)
        candidates, excluded = candidates + found, excluded + lost
    candidates, lost = _distinct(candidates)
    excluded += lost
    used = [
        name for name, weight in rules.weights.items() if weight > 0 and any(name in c["value"] for c in candidates)
    ]
    if rules.require_both_external:
        used = list(dict.fromkeys([*used, *EXTERNAL]))
    kept = []
    for c in candidates:
        missing = next((name for name in used if name not in c["value"]), None)
        if missing:
            excluded.append({"study": c["study"], "condition": c["condition"], "reason": c["missing"][missing]})
        else:
            kept.append(c)
    kept, lost = _one_reference(kept)
    excluded += lost
    for c in kept:
        c["score"] = sum(rules.weights.get(name, 0) * c["value"][name] / SCALES[name] for name in used)
        c["pareto"] = not any(_surpasses(o["value"], c["value"], used) for o in kept)
        del c["missing"]
    kept.sort(key=lambda c: (-c["score"], -c["value"].get("stability", 0.0), c["l0"], c["id"]))
    return {
        "rules": {
            "weights": rules.weights,
            "scales": SCALES,
            "min_seeds": rules.min_seeds,
            "uncertainty": rules.uncertainty,
            "require_both_external": rules.require_both_external,
            "figures": used,
        },
        "cohort": cohort and cohort.to_json(),
        "split": split,
        "candidates": kept,
        "excluded": excluded,
        "front": [c["condition"] for c in kept if c["pareto"]],
        "seeds_used": sorted(seeds_used),
        "confirmation_seeds": rules.confirmation_seeds,
        "selected": kept[0] if kept else None,
    }


def _out(study: Study, condition: str | None, reason: str) -> dict:
    return {"study": study.label, "condition": condition, "reason": reason}


def _seeds_in(banks: Any) -> set[int]:
    """Seeds of a study's SAEs, as far as they can be read: a bank that is refused has used its own all the same."""
    found, waiting = set(), [bank.get("sections") for bank in banks or [] if isinstance(bank, dict)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found |= {value["seed"]} if type(value.get("seed")) is int else set()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


def _seeds(section: ConditionSection) -> list[int]:
    return [m.seed for m in section.members]


def _split(banks: list[Bank]) -> dict:
    """Families of SAEBench and clusters of pairs that selection reads, and those it leaves to the gate.

    A group that selection reads in one benchmark is not left to the gate in the other.
    """
    clusters: set[str] = set()
    sets: dict[str, str] = {}
    for bank in banks:
        if bank.saebench is not None:
            sets |= dict(zip(bank.saebench.data_sets, bank.saebench.families, strict=True))
        clusters |= set() if bank.cebench is None else set(bank.cebench.clusters)
    families = set(sets.values())
    read = {*third(families)}
    read |= {*third(clusters, read, families - read)}
    return {
        "selection_families": sorted(read),
        "gate_families": sorted((families | clusters) - read),
        "gate_data_sets": [name for name, family in sets.items() if family not in read],
    }


def _rows(study: Study, bank: Bank, damaged: set[str], families: list[str], rules: Rules) -> tuple[list, list]:
    """(candidates of a bank, what is excluded of it)."""
    try:
        external = differences(bank, families)
    except (LookupError, TypeError, ValueError) as error:
        why = f"the benchmarks' differences cannot be computed ({type(error).__name__}: {error})"
        return [], [_out(study, row.get("condition"), why) for row in bank.conditions]
    found, lost = [], []
    records = {r.checkpoint_sha256: r for r in bank.saes}
    for section in bank.sections:
        own = [r for m in section.members if (r := records.get(m.checkpoint_sha256))]
        name = own[0].condition if own else f"{section.family} d{section.d_sae} k{section.k}"
        if name in damaged:
            continue  # said already
        if len(own) < len(section.members):
            lost.append(_out(study, name, "an SAE of it has no record"))
            continue
        try:
            group = SeedGroup.of(own)
            row = _figures(bank, section, own, name, external, rules)
        except (BadInput, LookupError, TypeError, ValueError) as error:
            lost.append(_out(study, name, f"it does not hold together ({error})"))
            continue
        if len(set(_seeds(section))) < rules.min_seeds:
            lost.append(_out(study, name, f"{len(set(_seeds(section)))} seeds; at least {rules.min_seeds} expected"))
            continue
        about = {"study": study.label, "study_sha256": study.sha256, "subject": study.results.get("subject")}
        about |= {"id": digest(group.facts.to_json()), **group.to_json()}
        found.append(about | {"seeds": _seeds(section), "recipe": bank.recipe.to_json(), **row})
    return found, lost


def _figures(
    bank: Bank, section: ConditionSection, own: list[ScoredRecord], name: str, external: dict, rules: Rules
) -> dict:
    """Estimates, and the values that are ranked; why one is missing."""
    excess = section.stability.scores[PRIMARY_SCORE].excess
    controls = [null for null in GATED_NULLS if null in excess]
    least = excess[min(controls, key=lambda null: _sure(excess[null]))]
    if least.low is not None and any(excess[null].low is None for null in controls):
        raise ValueError("an excess over a required null has no interval")
    figures = {
        "stability": least.to_json(),
        "train_ev": conditions.over_seeds([r.heldout.explained_variance for r in own]),
    }
    missing = {}
    for benchmark in EXTERNAL:
        if benchmark in external:
            figures[benchmark] = external[benchmark].get(name) or deltas.none(f"{benchmark} says nothing of it")
        else:
            missing[benchmark] = f"{benchmark} was not run"
    value = {}
    for figure, e in figures.items():
        found = e["low"] if rules.uncertainty == "lcb" else e["estimate"]
        if found is None:
            missing[figure] = f"{figure}: {e['reason']}"
        else:
            value[figure] = found
    published = next((r for r in bank.conditions if r.get("condition") == name), None)
    if published is None or published["checkpoints"] != {str(r.facts.seed): r.checkpoint_sha256 for r in own}:
        raise ValueError("the study's table names other checkpoints")
    l0 = sum(r.heldout.l0 for r in own) / len(own)
    return {"family": section.family, "l0": l0, "figures": figures, "value": value, "missing": missing}


def _sure(excess: Interval) -> float:
    return excess.estimate if excess.low is None else excess.low


def _distinct(candidates: list[dict]) -> tuple[list[dict], list[dict]]:
    """One candidate a configuration (the one with more seeds, then the first), and no SAE in two."""
    kept: list[dict] = []
    lost = []
    for c in sorted(candidates, key=lambda c: -len(set(c["seeds"]))):
        same = next((k for k in kept if k["id"] == c["id"]), None)
        shared = next((k for k in kept if set(k["identities"].values()) & set(c["identities"].values())), None)
        if other := same or shared:
            what = "the same configuration" if same else "an SAE of it"
            why = f"a duplicate: {what} stands in {other['study']}"
            lost.append({"study": c["study"], "condition": c["condition"], "reason": why})
        else:
            kept.append(c)
    return [c for c in candidates if c in kept], lost


def _one_reference(candidates: list[dict]) -> tuple[list[dict], list[dict]]:
    """Differences to one family of reference alone are comparable: to that of most candidates."""
    families = [references.reference_family(c["family"]) for c in candidates]
    usual = max(sorted(set(families)), key=families.count) if families else None
    kept, lost = [], []
    for c, family in zip(candidates, families, strict=True):
        if family == usual or not any(name in c["value"] for name in EXTERNAL):
            kept.append(c)
        else:
            why = f"its difference is to {family}, the others' to {usual}: not comparable"
            lost.append({"study": c["study"], "condition": c["condition"], "reason": why})
    return kept, lost


def _surpasses(a: dict, b: dict, names: list[str]) -> bool:
    return all(a[n] >= b[n] for n in names) and any(a[n] > b[n] for n in names)
