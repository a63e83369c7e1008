"""Damaged evidence for tests of the gate: every kind of damage at every place of every file.

A case is a bundle that passed, with one change, and the gates that must no longer pass. Problems of its files are
computed again, and digests fit the changed files. Only schemas, bindings and recomputation can therefore reveal the
change.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from husai.evidence.names import COMPARED_NULLS, GAP, GATED_NULLS
from husai.evidence.schemas import Strict
from husai.release.gate import GATES, Bundle, Thresholds, decide
from husai.release.recompute import decisions, results_problems
from husai.runs.files import digest
from husai.testing import simulate

OF_FILE = {
    "phase4a": ("positive_control",),
    "selection": tuple(g for g in GATES if g != "positive_control"),
    "confirmation": tuple(g for g in GATES if g != "positive_control"),
    "random_model": ("random_model",),
    "transcoder": ("transcoder",),
    "ood": ("ood",),
}
"""File -> gates that depend on it."""
OF_ONE_GATE = {
    r"confirmation/bank/saebench/(families|data_sets|probing|versions|random_seed)(/.*)?": ("saebench",),
    r"confirmation/bank/cebench/(benchmark|clusters|no_reference)(/.*)?": ("cebench",),
    r"confirmation/bank/code(/.*)?": ("code",),
    r"confirmation/(bank/sections/\d+|section)/gaussian/members/\d+/(seed|heldout)(/.*)?": ("stability",),
}
"""Places (patterns) on which one gate depends."""
ALONE = {
    "another version": ("saebench",),
    "another data set": ("saebench",),
    "a family that selection read": ("saebench",),
    "local pairs": ("cebench",),
    "another checkpoint": ("random_model", "transcoder", "ood"),
}
"""Kinds of damage to a whole confirmation that only some of its gates can detect -> these gates."""
A_SECTION = (
    r"(phase4a/husai|phase4a/planted/degrees/\d+/study|confirmation/(bank/sections/\d+|section)|"
    r"transcoder/(section|transcoder|across)|random_model/(section|random_models/\d+))"
)
INFORMATIONAL = {
    A_SECTION
    + r"/(members/\d+/(heldout/(explained_variance|mse|dead_share)|checkpoint|l0_miss|order_seed)|effective_rank)": (
        "held-out figures of the study's SAEs, their places, their order of rows, the rank of the activations: reported"
    ),
    A_SECTION + r"/members/\d+/heldout/l0": "within the tolerance it changes nothing; beyond, test_gate asks",
    A_SECTION
    + r"/(convergence/(from_step|to_step|moved/.*)|over_training/.*)": "whether training is at rest: reported",
    A_SECTION + r"/stability/(missing_nulls/.*|scores/.*/(draws|q95_of_mean))": "why a null that no gate reads is not "
    "there; how a null's draws spread, which the evidence does not keep",
    A_SECTION + r"/pairs/\d+/.*/mcc_gap_bound": "of a pair; the largest is made again",
    A_SECTION + r"/(others/\d+|strata/\d+/(features|mcc|share70)|"
    r"gaussian/members/\d+/heldout/(explained_variance|mse|dead_share))": "reported",
    A_SECTION + r"/gaussian/members/\d+/heldout/l0": "within the tolerance it changes nothing; beyond, test_gate asks",
    r"phase4a/husai/(hook_name|rows|d_in|members/\d+/(d_sae|k|family|learning_rate|assignment_weight))": "modular "
    "addition, which decides nothing",
    r"((random_model|confirmation)/section|transcoder/(section|transcoder|across))/(rows|d_in)": "size of the store; "
    "its digest counts",
    r"confirmation/bank/(saebench|cebench)/(subject|source|stories_cut)": "names; digests count",
    r"confirmation/bank/saebench/.*/(test_acc|test_f1|val_auc|auc_by_validation)": "further figures, never compared",
    r"confirmation/bank/cebench/.*/(published|corrected)/(contrastive|independence|interpretability)": "CE-Bench's "
    "other scores; corrected.interpretability is bound to the one that counts",
    r"confirmation/bank/(saebench|cebench)/noise/seeds/\d+": "of the benchmark's repeats, which no gate reads",
    r"confirmation/paths/\d+": "what lies there is compared with the evidence, in `on_disk`",
    r"(random_model|transcoder|ood)/subject": "a name; the digest counts",
    r"(random_model|transcoder|ood)/inputs/(held-out activations|transcoder input|shifted activations|probed texts)": (
        "of no figure that the gate can make again"
    ),
    r"transcoder/setting/batch_size": "reported",
    r"ood/shifted/llm/ood_low/\d+": "above 0.5 a set is kept: other values there change nothing",
    r"(selection|confirmation)/subject": "a name",
}
"""Places (patterns) whose values enter no decision -> reason. Their values may be edited, but not their types."""
OPEN = {
    r"ood/(rule|activations|skipped|families|shifted/prompts)(/.*)?": "reported, "
    "whatever they hold; the rule that counts is the gate's own",
    r"phase4a/husai/(curve_steps|snapshot_steps|spectral_groups|histogram_bins|histograms)(/.*)?": "drawn",
    r"phase4a/husai/members/\d+/(curve|aux_steps)(/.*)?": "drawn",
    r"phase4a/husai/gaussian/members/\d+/(seed|checkpoint)": "of modular addition's control; null where not known",
    A_SECTION + r"/gaussian/members/\d+/checkpoint": "where it lies",
    r"random_model/random_models/\d+/members/\d+/checkpoint": "where it lies; null where the user supplied it",
    r"phase4a/published(_figures)?(/.*)?": "the earlier study's",
    r"confirmation/bank/cebench/saes/\d+/checkout(/.*)?": "what CE-Bench's own code said, reported",
}
"""Places (patterns) whose values and types are free -> reason."""
FEW = 3
"""Largest number of a list's items that are all tried."""


@dataclass(frozen=True)
class Case:
    """A damaged bundle."""

    kind: str
    place: str
    """Path of the damage: file/key/…"""
    bundle: Bundle
    gates: tuple[str, ...]
    """Gates that must not pass."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    waived: tuple[str, ...] = ()

    def caught(self) -> bool:
        """True if the decision is no pass and none of `gates` passes, with or without recomputation of the evidence."""
        if self._refused(self.bundle):
            return True
        files = dict(self.bundle.files)
        label = self.place.split("/")[0]
        if (file := files.get(label)) is None:
            return False
        try:
            problems = results_problems(file.results)
        except (RecursionError, OverflowError) as error:
            problems = [str(error)]
        files[label] = replace(file, problems=problems)
        return self._refused(Bundle(files, self.bundle.on_disk))

    def _refused(self, bundle: Bundle) -> bool:
        decision = decide(bundle, self.thresholds, dict.fromkeys(self.waived, "said"))
        status = {g["gate"]: g["status"] for g in decision["gates"]}
        return not decision["pass_all"] and not any(status[g] == "PASS" for g in self.gates)


# ---------------------------------------------------------------------------------------------------------------------
# One value


NOTHING = object()
"""Result of damage that does not apply to a value or does not change it."""


def _edited(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + int(rng.integers(1, 9))
    if isinstance(value, float):
        return value + float(rng.choice([-1, 1]) * rng.uniform(0.001, 0.1))
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]$", lambda m: "0" if m[0] != "0" else "1", value) if len(value) == 64 else value + "2"
    return NOTHING


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


VALUES: dict[str, Callable[[Any, np.random.Generator], Any]] = {
    "null": lambda v, rng: None if v is not None else NOTHING,
    "number as text": lambda v, rng: str(v) if _number(v) else NOTHING,
    "number as boolean": lambda v, rng: bool(v) if _number(v) else NOTHING,
    "text as number": lambda v, rng: 1 if isinstance(v, str) else NOTHING,
    "NaN": lambda v, rng: float("nan") if _number(v) else NOTHING,
    "infinity": lambda v, rng: float("inf") if _number(v) else NOTHING,
    "list as object": lambda v, rng: {str(i): x for i, x in enumerate(v)} if isinstance(v, list) else NOTHING,
    "object as list": lambda v, rng: list(v.values()) if isinstance(v, dict) else NOTHING,
    "emptied": lambda v, rng: type(v)() if isinstance(v, dict | list) and v else NOTHING,
    "shorter": lambda v, rng: v[:-1] if isinstance(v, list) and v else NOTHING,
    "longer": lambda v, rng: [*v, v[-1]] if isinstance(v, list) and v else NOTHING,
    "unknown key": lambda v, rng: v | {"unknown": 0.5} if isinstance(v, dict) else NOTHING,
    "edited": _edited,
}
"""Kind of damage -> function of a value. Keys are also removed and renamed."""


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Every place below a JSON value. Of a long list, the first, the middle and the last item are visited."""
    keys: Sequence[Any]
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value)) if len(value) <= FEW else [0, len(value) // 2, len(value) - 1]
    else:
        return
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def changed(results: dict, at: tuple, change: Callable[[Any, Any], None]) -> dict:
    """Results after `change(parent, key)` at a place. Only the containers on the path are copied."""
    results = top = copy.copy(results)
    for key in at[:-1]:
        results[key] = copy.copy(results[key])
        results = results[key]
    change(results, at[-1])
    return top


def of_values(bundle: Bundle, rng: np.random.Generator) -> Iterator[Case]:
    """Cases with each kind of damage at each place of each file."""
    for label in bundle.files:
        file = bundle.given(label)
        for at in places(file.results):
            place = "/".join((label, *map(str, at)))
            if _any(OPEN, place):
                continue
            value = _at(file.results, at)
            named = isinstance(at[-1], str)

            def case(kind: str, change: Callable, label=label, file=file, at=at, place=place) -> Case:
                results = changed(file.results, at, change)
                files = bundle.files | {label: replace(file, results=results, sha256=digest([place, kind]))}
                return Case(kind, place, Bundle(files, bundle.on_disk), gates_of(place))

            for kind, damage in VALUES.items():
                new = damage(value, rng)
                if new is not NOTHING and not (kind == "edited" and _any(INFORMATIONAL, place)):
                    yield case(kind, lambda parent, key, new=new: parent.__setitem__(key, new))
            if named:
                yield case("key removed", lambda parent, key: parent.pop(key))
                yield case("key renamed", lambda parent, key: parent.__setitem__(f"{key}_", parent.pop(key)))


def _at(value: Any, at: Sequence) -> Any:
    for key in at:
        value = value[key]
    return value


def gates_of(place: str) -> tuple[str, ...]:
    matches = (gates for pattern, gates in OF_ONE_GATE.items() if re.fullmatch(pattern, place))
    return next(matches, OF_FILE[place.split("/")[0]])


def free(place: str) -> bool:
    """True if no decision depends on this place or on places below it."""
    return _any(OPEN, place) or _any(INFORMATIONAL, place)


def _any(patterns: dict[str, str], place: str) -> bool:
    return any(re.fullmatch(pattern, place) for pattern in patterns)


# ---------------------------------------------------------------------------------------------------------------------
# Consistent evidence that belongs to another candidate, or to none


def of_bundles(bundle: Bundle, others: list[Bundle]) -> Iterator[Case]:
    """Cases of damage that no single value reveals.

    Args:
        others: bundles of other seeds that pass. Their files replace those of this bundle.
    """

    def case(kind: str, label: str, gates: tuple[str, ...], **changes) -> Case:
        files = bundle.files | ({label: changes["file"]} if "file" in changes else {})
        damaged_bundle = Bundle(files, changes.get("on_disk", bundle.on_disk))
        given = {n: changes[n] for n in ("thresholds", "waived") if n in changes}
        return Case(kind, label, damaged_bundle, gates, **given)

    for label, gates in OF_FILE.items():
        file = bundle.given(label)
        yield case("file not given", label, gates, file=None)
        yield case("file unreadable", label, gates, file=replace(file, results=None, problems=["unreadable"]))
        yield case("no digest", label, gates, file=replace(file, sha256=None))
        for other in others:
            if label not in ("phase4a", "selection"):
                yield case("another candidate's file", label, gates, file=other.files[label])
        for title, old, new in _replacements(bundle, label):
            results = json.loads(json.dumps(file.results).replace(old, new))
            if results != file.results:
                rest = ALONE.get(title, gates) if label == "confirmation" else gates
                yield case(title, label, rest, file=replace(file, results=results, sha256=digest([title, label, new])))
        for title, results in (*_swaps(file.results, label), *_other_accounts(file.results, label)):
            yield case(title, label, gates, file=replace(file, results=results, sha256=digest([title, label])))
    stale = replace(bundle.given("selection"), sha256=digest("another selection"))
    yield case("stale selection", "selection", OF_FILE["selection"], file=stale)
    for seed in bundle.on_disk:
        for title, identity in (("absent", None), ("another", digest("another checkpoint"))):
            disk = bundle.on_disk | {seed: identity}
            yield case(f"checkpoint {title} on disk", "confirmation", OF_FILE["confirmation"], on_disk=disk)
    for gate in GATES:
        yield case("waived", "", (), waived=(gate,))
    registered = Thresholds()
    for name, value in vars(registered).items():
        loose = value - 0.01 if name.startswith("min") else value + 0.01
        yield case("looser threshold", "", (), thresholds=replace(registered, **{name: loose}))


def _replacements(bundle: Bundle, label: str) -> Iterator[tuple[str, str, str]]:
    """(kind, text, other text) for replacements in a whole file."""
    candidate = bundle.given("confirmation").results["candidate"]
    facts = candidate["facts"]
    other = digest("another")
    if label == "phase4a":
        planted_subject = bundle.given("phase4a").results["planted"]["degrees"][0]["study"]["subject_digest"]
        yield "the candidate's own subject", planted_subject, facts["subject_digest"]
        return
    yield "another subject", facts["subject_digest"], other
    if label != "ood":
        yield "another hook", f'"{facts["hook_name"]}"', '"blocks.3.hook_resid_pre"'
        yield "another width", f'"d_sae": {facts["d_sae"]}', '"d_sae": 1024'
    if label != "transcoder":
        yield "another store", facts["store_digest"], other
        yield "another recipe", facts["training"], other
    for sha in candidate["checkpoints"].values():
        yield "another checkpoint", sha, other
    if label in ("confirmation", "ood"):
        yield "another version", '"sae-probes": "0.4.2"', '"sae-probes": "0.4.1"'
    if label == "confirmation":
        sets = bundle.given("confirmation").results["bank"]["saebench"]
        yield "another data set", f'"{sets["data_sets"][0]}"', '"2_hist_fig_birthyear"'
        yield "a family that selection read", f'"{sets["families"][0]}"', f'"{_read_family(bundle)}"'
        yield "local pairs", '"benchmark": "cebench"', '"benchmark": "contrastive_local"'


def _read_family(bundle: Bundle) -> str:
    return bundle.given("selection").results["split"]["selection_families"][0]


def _attempts(confirmation: dict) -> Iterator[tuple[str, dict]]:
    """(kind, inconsistent attempt and ledger)."""
    if "ledger" not in confirmation:  # SAEs that a user supplies
        return
    ledger, own_entry = confirmation["ledger"], confirmation["ledger"][-1]
    other = own_entry | {"saes": digest("other SAEs")}
    for kind, entries in (
        ("one attempt twice", [*ledger, own_entry]),
        ("a later attempt", [*ledger, other]),
        ("an attempt by other SAEs", [*ledger[:-1], other]),
        ("an attempt on other seeds", [*ledger[:-1], own_entry | {"seeds": own_entry["seeds"][1:]}]),
        ("an attempt of another selection", [*ledger[:-1], own_entry | {"selection": digest("another selection")}]),
        ("an attempt of another configuration", [other | {"candidate": digest("another")}, *ledger]),
        ("no attempt", []),
    ):
        yield kind, {"ledger": entries, "attempt": len(entries)}
    for attempt in {0, len(ledger) - 1, len(ledger) + 1, -1}:
        yield "a number that the ledger does not count", {"attempt": attempt}


def _other_accounts(results: dict, label: str) -> Iterator[tuple[str, dict]]:
    """(kind, results of a stress test with other scores of the candidate's own pairs, and fitting derived figures)."""
    if label not in ("random_model", "transcoder"):
        return

    def again(new: dict) -> dict:
        simulate.summarise_again(new["section"])
        for place, value in decisions(new).items():
            *above, key = place.split("/")[1:]
            _at(new, above)[key] = json.loads(json.dumps(value, default=Strict.to_json))
        return new

    for name, by in (("observed", 0.01), *((null, -0.01) for null in GATED_NULLS)):
        new = copy.deepcopy(results)
        for pair in new["section"]["pairs"]:
            pair[name] = {score: value + (score != GAP) * by for score, value in pair[name].items()}
        yield "another account of its own SAEs", again(new)
    for null in COMPARED_NULLS:  # the number of draws is no figure that can be made again
        new = copy.deepcopy(results)
        for score in new["section"]["stability"]["scores"].values():
            score["nulls"][null]["draws"] += 1
        yield "other draws of its own SAEs", new
    new = copy.deepcopy(results)
    for member in new["section"]["members"]:
        member["heldout"]["l0"] *= 1.05
    yield "another L0 of its own SAEs", again(new)


def _swaps(results: dict, label: str) -> Iterator[tuple[str, dict]]:
    """(kind, results) with two SAEs exchanged, or a pair of seeds counted twice."""
    if label == "confirmation":
        for owner in ((), ("saebench",), ("cebench",)):
            for kind, i, j in (("seeds swapped", 0, 1), ("swapped with the reference", 0, -1)):
                for name in ("identity", "checkpoint_sha256", "facts", "heldout"):
                    new = copy.deepcopy(results)
                    saes = _at(new["bank"], owner)["saes"]
                    if saes[i][name] != saes[j][name]:
                        saes[i][name], saes[j][name] = saes[j][name], saes[i][name]
                        yield kind, new
        for kind, tried in _attempts(results):
            yield kind, copy.copy(results) | tried
    for at in [at for at in places(results) if at[-1] == "pairs" and isinstance(_at(results, at), list)]:
        first, *rest = _at(results, at)
        for kind, pairs in (("duplicate pair", [first, *rest[:-1], first]), ("a seed paired with itself", None)):
            changed_pairs = [first | {"a": first["b"]}, *rest] if pairs is None else pairs

            def put(parent: Any, key: Any, value: list = changed_pairs) -> None:
                parent[key] = value

            yield kind, changed(results, at, put)
