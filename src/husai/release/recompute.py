"""Audits evidence folders: checks manifests, and computes again all conclusions from pairs of seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from husai.evidence import coding, conditions, contrast, deltas, drop, planted, random_model, rules, transcoder
from husai.evidence.names import GAP
from husai.evidence.schemas import (
    AdaptiveL0,
    AssignmentConsistency,
    Bank,
    Compared,
    Contrastive,
    CoreAblations,
    Evaluated,
    Interval,
    OODStress,
    Phase4a,
    Probing,
    RandomModelStress,
    Retrained,
    Strict,
    TranscoderStress,
    read_evaluation,
    refusal,
)
from husai.evidence.stability import summarise
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file
from husai.runs.folder import Manifest

NOT_KEPT = {"draws", "q95_of_mean"}
"""Figures that need single draws of a null. Evidence keeps only the mean of each pair."""


EARLIER_RULES = "earlier_rules"
"""Folder below docs/evidence with runs under superseded rules. Only the integrity of their files is checked."""


def of_earlier_rules(path: Path, root: Path) -> bool:
    return path.is_relative_to(root / "docs" / "evidence" / EARLIER_RULES)


def audit_evidence(root: Path) -> dict[str, list[str]]:
    """Folder -> its problems, for every folder below docs/evidence with results or a manifest."""
    paths = [p for name in ("results.json", "manifest.json") for p in (root / "docs" / "evidence").rglob(name)]
    folders = sorted({p.parent for p in paths})
    return {str(f.relative_to(root)): folder_problems(f, not of_earlier_rules(f, root)) for f in folders}


def folder_problems(folder: Path, recompute: bool = True) -> list[str]:
    """Problems of an evidence folder: of its manifest, its files, and figures that are computed again."""
    try:
        results = read_json(folder / "results.json", "evidence")
        manifest = Manifest.model_validate(read_json(folder / "manifest.json", "evidence"), strict=True)
    except BadInput as error:
        return [str(error)]
    except ValidationError as error:
        first = error.errors()[0]
        return [f"manifest.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"]
    digests = {p.name: sha256_file(p) if p.is_file() else None for p in sorted(folder.iterdir())}
    problems = manifest_problems(manifest, results, digests)
    try:
        return problems + (results_problems(results) if recompute else [])
    except (RecursionError, OverflowError) as error:
        return [*problems, f"results.json cannot be computed again ({type(error).__name__}: {error})"]


def run_problems(path: Path) -> tuple[Any, list[str]]:
    """(results of a run, their problems).

    The manifest beside the results must describe a finished run and these bytes. Conclusions from pairs, members and
    data sets are computed again.

    Raises:
        BadInput: the file is missing or is no strict JSON.
    """
    results = read_json(path, "evidence")
    try:
        manifest = Manifest.model_validate(read_json(path.with_name("manifest.json"), "evidence"), strict=True)
    except BadInput as error:
        return results, [str(error)]
    except ValidationError as error:
        return results, [f"manifest.json: {error.errors()[0]['msg']}"]
    digests = {"results.json": sha256_file(path), "summary.md": manifest.outputs.get("summary.md")}
    problems = manifest_problems(manifest, results, digests)
    return results, problems or results_problems(results)


def results_problems(results: Any) -> list[str]:
    """Places at which results do not follow from their pairs, members and data sets."""
    problems = [f"{at}: {problem}" for at, study in studies(results) for problem in study_problems(study)]
    return problems + phase_problems(results)


def manifest_problems(manifest: Manifest, results: Any, digests: dict[str, str | None]) -> list[str]:
    """Problems of a manifest: it must describe a finished run, these results, and every file in the folder.

    Args:
        digests: name in the folder -> sha256, or None if it is no file. Figures are in the folder itself.
    """
    problems = []
    if manifest.status != "complete" or manifest.return_code not in (0, 1):  # 1: a failed check is a result too
        ended = f"{manifest.status}, return code {manifest.return_code}"
        problems.append(f"the run is {ended}; complete and 0, or 1 for a check that did not hold, expected")
    if "summary.md" not in digests:
        problems.append("summary.md is missing")
    for name, sha256 in digests.items():
        expected = manifest.outputs.get(name, manifest.outputs.get(f"figures/{name}"))
        if name == "manifest.json":
            continue
        if expected is None:
            problems.append(f"{name} is not known to the manifest")
        elif sha256 != expected:
            problems.append(f"{name} is not the file that the manifest names (sha256 differs)")
    if not isinstance(results, dict) or results.get("inputs") != manifest.inputs:
        problems.append("the inputs in the results are not those in the manifest")
    return problems


def studies(value: Any, at: str = "") -> Iterator[tuple[str, dict]]:
    """(JSON pointer, object) of every object that has both `stability` and `pairs`."""
    remaining = [(at, value)]
    while remaining:
        at, value = remaining.pop()
        if isinstance(value, dict) and {"stability", "pairs"} <= value.keys():
            yield at or "/", value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        remaining += [(f"{at}/{key}", item) for key, item in items if isinstance(item, dict | list)][::-1]


def study_problems(study: dict) -> list[str]:
    """Differences of `stability` from a new computation from `pairs`: estimates, intervals, null means, verdict."""
    try:
        published = study["stability"]
        labels, missing = published["labels"], published["missing_nulls"]
        expected = set(combinations(range(len(labels)), 2))
        pairs = {
            (labels.index(p["a"]), labels.index(p["b"])): {
                null: {"mean": {GAP: 0.0} | scores, "draws": None}
                for null, scores in p.items()
                if null not in ("a", "b")
            }
            for p in study["pairs"]
        }
        if set(pairs) != expected or len(study["pairs"]) != len(expected):
            return ["pairs: each pair of labels once expected"]
        recomputed = summarise(labels, pairs, missing).to_json()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"stability cannot be computed again from the pairs ({type(error).__name__}: {error})"]
    if GAP not in published:  # older evidence lacks it
        del recomputed[GAP]
    return list(differences(published, recomputed, "stability"))


def ablation_decisions(phase: CoreAblations) -> dict[str, Any]:
    """Held-out means of each section, and gains of methods: place in the results -> value."""
    conclusions: dict[str, Any] = {}
    for at, sections in (("rows", phase.rows), ("methods", phase.methods)):
        for i, section in enumerate(sections):
            for name in ("explained_variance", "l0", "dead_share"):
                conclusions[f"/{at}/{i}/{name}"] = contrast.heldout(section, name)
    for i, method in enumerate(phase.methods[1:], 1):
        conclusions |= against(f"/methods/{i}", method, phase.methods[0])
    return conclusions


def adaptive_decisions(phase: AdaptiveL0) -> dict[str, Any]:
    """Figures of the choice of k, the choice, and its confirmation: place in the results -> value."""
    conclusions: dict[str, Any] = {"/chosen_k": rules.choose_k(phase.selection, phase.ev_floor)}
    for at, sections in (("selection", phase.selection), ("confirmation", phase.confirmation)):
        for i, section in enumerate(sections):
            conclusions[f"/{at}/{i}/lower_bound"] = contrast.lower_bound(section)
            conclusions[f"/{at}/{i}/explained_variance"] = contrast.heldout(section)
    gain, seeds = None, 0
    if len(phase.confirmation) == 2:
        chosen, control = phase.confirmation
        conclusions |= against("", chosen, control)
        gain, seeds = conclusions["/gain"], len(chosen.members)
    return conclusions | {"/outcome": rules.sparsity_outcome(phase.chosen_k, gain, seeds)}


def assignment_decisions(phase: AssignmentConsistency) -> dict[str, Any]:
    """Gains of every arm, and the acceptance: place in the results -> value."""
    conclusions: dict[str, Any] = {}
    for i, arm in enumerate(phase.own):
        conclusions |= against(f"/own/{i}", arm, phase.control)
    for i, shared in enumerate(phase.shared):
        mean, left_out = contrast.gain_and_left_out(shared.references, phase.control)
        conclusions |= {f"/shared/{i}/gain": mean, f"/shared/{i}/leave_one_reference_out": left_out}
        for j, section in enumerate(shared.references):
            conclusions |= against(f"/shared/{i}/references/{j}", section, phase.control)
    gain = lost = None
    seeds = 0
    if phase.confirmed:
        control, pulled = phase.confirmed
        conclusions |= against("/confirmation/1", pulled, control)
        gain, lost, seeds = (
            conclusions["/confirmation/1/gain"],
            conclusions["/confirmation/1/ev_drop"],
            len(pulled.members),
        )
    return conclusions | {"/acceptance": rules.acceptance(phase.own, gain, lost, seeds, phase.max_ev_drop)}


def against(at: str, section: Compared, control: Compared) -> dict[str, Any]:
    """Gain of an arm over its control, and its loss of explained variance: place in the results -> value."""
    return {f"{at}/gain": contrast.gain([section], [control]), f"{at}/ev_drop": contrast.drop(section, control)}


PHASES: dict[str, tuple[type[Strict], Callable[[Any], dict]]] = {
    "4a": (Phase4a, planted.decisions),
    "core_ablations": (CoreAblations, ablation_decisions),
    "adaptive_l0_calibration": (AdaptiveL0, adaptive_decisions),
    "assignment_consistency_v2": (AssignmentConsistency, assignment_decisions),
    "saebench_custom": (Probing, lambda results: {"/conditions": deltas.saebench(results)}),
    "cebench_custom": (Contrastive, lambda results: {"/conditions": deltas.contrastive(results)}),
    "random_model_stress": (RandomModelStress, random_model.decisions),
    "transcoder_stress": (TranscoderStress, transcoder.decisions),
    "ood_stress": (OODStress, drop.decisions),
}
"""Phase -> (its schema, function that gives conclusions from its figures: place in the results -> value)."""


def decisions(results: dict) -> dict[str, Any]:
    """Conclusions of a phase, computed again from its figures: place in the results -> value."""
    phase = results.get("phase")
    conclusions: dict[str, Any] = {}

    def of_parts(at: str, bank: Evaluated | Bank) -> None:
        if bank.saebench is not None:
            conclusions[f"{at}/saebench/conditions"] = deltas.saebench(bank.saebench)
        if bank.cebench is not None:
            conclusions[f"{at}/cebench/conditions"] = deltas.contrastive(bank.cebench)
        if bank.code is not None:
            conclusions[f"{at}/code/gain"] = coding.concluded(bank.code).to_json()["gain"]

    def of_bank(at: str, bank: Bank) -> None:
        of_parts(at, bank)
        conclusions[f"{at}/conditions"] = conditions.conditions(bank)

    if phase in PHASES:
        schema, function = PHASES[phase]
        conclusions |= function(schema.model_validate(results))
    elif phase == "candidate_confirmation":
        evaluation = read_evaluation(results)
        if isinstance(evaluation, Retrained):
            of_bank("/bank", evaluation.bank)
        else:
            of_parts("/bank", evaluation.bank)
    elif phase in ("architecture_frontier", "external_metric_scaling"):
        banks = [Bank.model_validate(bank) for bank in results["banks"]]
        for i, bank in enumerate(banks):
            of_bank(f"/banks/{i}", bank)
        rows = [row for bank in banks for row in bank.conditions]
        if phase == "architecture_frontier":
            conclusions["/pareto"] = conditions.pareto(rows)
        else:
            conclusions["/contrasts"] = conditions.contrasts(banks)
            conclusions["/power_laws"] = conditions.power_laws(rows)
    for at, study in studies(results):
        if "convergence" in study:
            moved = Interval.model_validate(study["convergence"]["moved"])
            conclusions[f"{at}/convergence/converged"] = rules.at_rest(moved)
    return conclusions


def phase_problems(results: Any) -> list[str]:
    """Places at which conclusions of a phase do not follow from its figures."""
    try:
        if not isinstance(results, dict) or "phase" not in results:
            return []
        return [
            problem
            for at, value in decisions(results).items()
            for problem in differences(resolve(results, at), value, at)
        ]
    except ValidationError as error:
        return [f"the phase's results are not what they should be: {refusal(error)}"]
    except (BadInput, LookupError, TypeError, ValueError, AttributeError) as error:
        return [f"the phase's decisions cannot be made again ({type(error).__name__}: {error})"]


def resolve(value: Any, pointer: str) -> Any:
    """Value at an RFC 6901 pointer. Raises LookupError if there is none."""
    for token in pointer.split("/")[1:]:
        token = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and re.fullmatch("0|[1-9][0-9]{0,8}", token) and int(token) < len(value):
            value = value[int(token)]
        else:
            raise LookupError(f"the artefact has no {pointer} (it ends before {token!r})")
    return value


def differences(published: Any, recomputed: Any, at: str) -> Iterator[str]:
    """Places at which two JSON values differ by more than rounding. The second value can be typed evidence."""
    if isinstance(recomputed, Strict):
        recomputed = recomputed.to_json()
    if isinstance(published, dict) and isinstance(recomputed, dict):
        for key in sorted((published.keys() ^ recomputed.keys()) - NOT_KEPT):
            yield f"{at}/{key} is {'not recomputed' if key in published else 'missing'}"
        for key in [k for k in published if k in recomputed and k not in NOT_KEPT]:
            yield from differences(published[key], recomputed[key], f"{at}/{key}")
    elif isinstance(published, list) and isinstance(recomputed, list) and len(published) == len(recomputed):
        for i, values in enumerate(zip(published, recomputed, strict=True)):
            yield from differences(*values, f"{at}/{i}")
    elif type(published) is float and isinstance(recomputed, float):
        if not math.isclose(published, recomputed, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{at} is {published}, computed again {recomputed}"
    elif isinstance(published, bool) != isinstance(recomputed, bool) or published != recomputed:
        yield f"{at} is {published!r}, computed again {recomputed!r}"
