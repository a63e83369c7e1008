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
"""Unit of each figure. Units are fixed, therefore a score does not depend on other candidates."""
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
        """Fields. `probing` is left out for sae-probes' own code, because older evidence does not have it."""
        return {k: v for k, v in vars(self).items() if k != "probing" or v not in (None, "sae_probes")}

    def differs(self, other: Cohort) -> str | None:
        """Reason why rows of another bank are not comparable; None if they are."""
        for name, difference in (
            ("subject_digest", "another subject"),
            ("data_sets", "other probing data sets"),
            ("probing_seed", "another probing seed"),
            ("probing", "probes of another name"),
            ("versions", "other versions of the benchmark's packages"),
            ("benchmark", "another contrastive benchmark"),
            ("pairs_digest", "other story pairs"),
        ):
            if getattr(self, name) != getattr(other, name):
                return f"{difference} than the first bank"
        return None


def on_families(probing: Probing, families: set[str], inside: bool) -> Probing:
    """Probing restricted to the data sets of these families, or to the other ones."""
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
    """Contrastive scores restricted to the pairs of these clusters, or to the other ones."""
    keep = [i for i, c in enumerate(pairs.clusters) if (c in clusters) == inside]

    def cut(records: list[PairScores | Reference]) -> list[PairScores | Reference]:
        return [r.model_copy(update={"normalised_of_pairs": _at(keep, r.normalised_of_pairs)}) for r in records]

    scored = {name: cut(getattr(pairs, name)) for name in ("saes", "controls", "untrained", "references")}
    return pairs.model_copy(update={"clusters": _at(keep, pairs.clusters), **scored})


def _at(places: list[int], values: list) -> list:
    return [values[i] for i in places]


def differences(bank: Bank, families: Iterable[str], inside: bool = True) -> dict[str, dict[str, dict]]:
    """{benchmark: {condition: delta to its matched reference}} on these families, or on the other ones."""
    chosen, rows = set(families), {}
    if bank.saebench is not None and (probing := on_families(bank.saebench, chosen, inside)).data_sets:
        rows["saebench"] = deltas.saebench(probing)
    if bank.cebench is not None and (pairs := on_clusters(bank.cebench, chosen, inside)).clusters:
        rows["cebench"] = deltas.contrastive(pairs)
    return {
        name: {row["condition"]: row["delta"]["reference"] for row in rows_of_benchmark}
        for name, rows_of_benchmark in rows.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Usable parts of a study


def cleaned(bank: Any) -> tuple[Bank | None, dict[str, str]]:
    """(the bank without invalid records, {condition: why it lost one}), or (None, {"": why}) for an unusable bank."""
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
    """Results of a selection.

    Returns:
        {"rules", "cohort", "split": families that selection reads, and families left for the gate, "candidates": rows
        with figures and score, best first, "excluded": [{"study", "condition", "reason"}], "front": conditions that no
        other condition surpasses in all figures, "seeds_used", "confirmation_seeds", "selected": a candidate, or None}
    """
    banks, excluded = [], []
    seeds_used: set[int] = set()
    for study in studies:
        banks_of_study = study.results.get("banks") if isinstance(study.results, dict) else None
        seeds_used |= _seeds_in(banks_of_study if isinstance(banks_of_study, list) else None)
        if not isinstance(banks_of_study, list) or study.results.get("phase") not in STUDIES:
            excluded.append(_out(study, None, "it is no result of a frontier or scaling study"))
            continue
        for i, raw in enumerate(banks_of_study):
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
        candidates_of_bank, lost = _rows(study, bank, damaged, split["selection_families"], rules)
        candidates, excluded = candidates + candidates_of_bank, excluded + lost
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
    """Seeds of a study's SAEs, as far as they can be read. Seeds of a refused bank count as used too."""
    seeds, waiting = set(), [bank.get("sections") for bank in banks or [] if isinstance(bank, dict)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            seeds |= {value["seed"]} if type(value.get("seed")) is int else set()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return seeds


def _seeds(section: ConditionSection) -> list[int]:
    return [m.seed for m in section.members]


def _split(banks: list[Bank]) -> dict:
    """Families of SAEBench and clusters of pairs that selection reads, and those that it leaves to the gate.

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
    """(candidates of a bank, its excluded conditions with reasons)."""
    try:
        external = differences(bank, families)
    except (LookupError, TypeError, ValueError) as error:
        why = f"the benchmarks' differences cannot be computed ({type(error).__name__}: {error})"
        return [], [_out(study, row.get("condition"), why) for row in bank.conditions]
    candidates, lost = [], []
    records = {r.checkpoint_sha256: r for r in bank.saes}
    for section in bank.sections:
        records_of_section = [r for m in section.members if (r := records.get(m.checkpoint_sha256))]
        name = (
            records_of_section[0].condition if records_of_section else f"{section.family} d{section.d_sae} k{section.k}"
        )
        if name in damaged:
            continue  # the reason is recorded already
        if len(records_of_section) < len(section.members):
            lost.append(_out(study, name, "an SAE of it has no record"))
            continue
        try:
            group = SeedGroup.of(records_of_section)
            row = _figures(bank, section, records_of_section, name, external, rules)
        except (BadInput, LookupError, TypeError, ValueError) as error:
            lost.append(_out(study, name, f"it does not hold together ({error})"))
            continue
        if len(set(_seeds(section))) < rules.min_seeds:
            lost.append(_out(study, name, f"{len(set(_seeds(section)))} seeds; at least {rules.min_seeds} expected"))
            continue
        facts = {"study": study.label, "study_sha256": study.sha256, "subject": study.results.get("subject")}
        facts |= {"id": digest(group.facts.to_json()), **group.to_json()}
        candidates.append(facts | {"seeds": _seeds(section), "recipe": bank.recipe.to_json(), **row})
    return candidates, lost


def _figures(
    bank: Bank, section: ConditionSection, member_records: list[ScoredRecord], name: str, external: dict, rules: Rules
) -> dict:
    """Estimates of a candidate, the values that are ranked, and the reason for each missing value."""
    excess = section.stability.scores[PRIMARY_SCORE].excess
    controls = [null for null in GATED_NULLS if null in excess]
    least = excess[min(controls, key=lambda null: _sure(excess[null]))]
    if least.low is not None and any(excess[null].low is None for null in controls):
        raise ValueError("an excess over a required null has no interval")
    figures = {
        "stability": least.to_json(),
        "train_ev": conditions.over_seeds([r.heldout.explained_variance for r in member_records]),
    }
    missing = {}
    for benchmark in EXTERNAL:
        if benchmark in external:
            figures[benchmark] = external[benchmark].get(name) or deltas.none(f"{benchmark} says nothing of it")
        else:
            missing[benchmark] = f"{benchmark} was not run"
    value = {}
    for figure, e in figures.items():
        ranked_value = e["low"] if rules.uncertainty == "lcb" else e["estimate"]
        if ranked_value is None:
            missing[figure] = f"{figure}: {e['reason']}"
        else:
            value[figure] = ranked_value
    published = next((r for r in bank.conditions if r.get("condition") == name), None)
    if published is None or published["checkpoints"] != {
        str(r.facts.seed): r.checkpoint_sha256 for r in member_records
    }:
        raise ValueError("the study's table names other checkpoints")
    l0 = sum(r.heldout.l0 for r in member_records) / len(member_records)
    return {"family": section.family, "l0": l0, "figures": figures, "value": value, "missing": missing}


def _sure(excess: Interval) -> float:
    return excess.estimate if excess.low is None else excess.low


def _distinct(candidates: list[dict]) -> tuple[list[dict], list[dict]]:
    """(candidates without duplicates, excluded ones). Of duplicates, the one with more seeds or the first is kept."""
    kept: list[dict] = []
    lost = []
    for c in sorted(candidates, key=lambda c: -len(set(c["seeds"]))):
        same = next((k for k in kept if k["id"] == c["id"]), None)
        shared = next((k for k in kept if set(k["identities"].values()) & set(c["identities"].values())), None)
        if other := same or shared:
            duplicate = "the same configuration" if same else "an SAE of it"
            why = f"a duplicate: {duplicate} stands in {other['study']}"
            lost.append({"study": c["study"], "condition": c["condition"], "reason": why})
        else:
            kept.append(c)
    return [c for c in candidates if c in kept], lost


def _one_reference(candidates: list[dict]) -> tuple[list[dict], list[dict]]:
    """(candidates with the most frequent reference architecture, excluded ones). Other deltas are not comparable."""
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
