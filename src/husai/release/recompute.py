"""Evidence folders, not trusted: the manifest is checked, and what rests on pairs of seeds is computed again."""

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
"""Figures of single draws of a null. The evidence keeps only the mean of each pair."""


EARLIER_RULES = "earlier_rules"
"""Folder below docs/evidence whose runs were judged by rules that no longer stand: only their files are checked."""


def of_earlier_rules(path: Path, root: Path) -> bool:
    return path.is_relative_to(root / "docs" / "evidence" / EARLIER_RULES)


def audit_evidence(root: Path) -> dict[str, list[str]]:
    """Every folder below docs/evidence with results or a manifest: name -> problems."""
    found = [p for name in ("results.json", "manifest.json") for p in (root / "docs" / "evidence").rglob(name)]
    folders = sorted({p.parent for p in found})
    return {str(f.relative_to(root)): folder_problems(f, not of_earlier_rules(f, root)) for f in folders}


def folder_problems(folder: Path, again: bool = True) -> list[str]:
    """Faults of an evidence folder: in its manifest, its files, and figures that are computed again."""
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
        return problems + (results_problems(results) if again else [])
    except (RecursionError, OverflowError) as error:
        return [*problems, f"results.json cannot be computed again ({type(error).__name__}: {error})"]


def run_problems(path: Path) -> tuple[Any, list[str]]:
    """(the results of a run, what is wrong with them): the manifest beside them must speak of a finished run and of
    these very bytes, and what rests on pairs, members and data sets is computed again.

    Raises:
        BadInput: the file is missing or is not strict JSON.
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
    """Places at which results do not follow from their own pairs, members and data sets."""
    found = [f"{at}: {problem}" for at, study in studies(results) for problem in study_problems(study)]
    return found + phase_problems(results)


def manifest_problems(manifest: Manifest, results: Any, digests: dict[str, str | None]) -> list[str]:
    """Does the manifest speak of a finished run, of these results, and of every file beside them?

    Args:
        digests: name in the folder -> sha256, or None where it is no file. Figures lie flat in it.
    """
    problems = []
    if manifest.status != "complete" or manifest.return_code not in (0, 1):  # 1: a check did not hold, a result too
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
    left = [(at, value)]
    while left:
        at, value = left.pop()
        if isinstance(value, dict) and {"stability", "pairs"} <= value.keys():
            yield at or "/", value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{at}/{key}", item) for key, item in items if isinstance(item, dict | list)][::-1]


def study_problems(study: dict) -> list[str]:
    """Compute `stability` again from `pairs`: every estimate, interval and null mean, and the verdict."""
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
    if GAP not in published:  # evidence from before there was one
        del recomputed[GAP]
    return list(differences(published, recomputed, "stability"))


def ablation_decisions(phase: CoreAblations) -> dict[str, Any]:
    """Held-out means of each section, and the gains of methods: place in the results -> value."""
    again: dict[str, Any] = {}
    for at, sections in (("rows", phase.rows), ("methods", phase.methods)):
        for i, section in enumerate(sections):
            for name in ("explained_variance", "l0", "dead_share"):
                again[f"/{at}/{i}/{name}"] = contrast.heldout(section, name)
    for i, method in enumerate(phase.methods[1:], 1):
        again |= against(f"/methods/{i}", method, phase.methods[0])
    return again


def adaptive_decisions(phase: AdaptiveL0) -> dict[str, Any]:
    """The figures that the choice reads, the choice, and its confirmation."""
    again: dict[str, Any] = {"/chosen_k": rules.choose_k(phase.selection, phase.ev_floor)}
    for at, sections in (("selection", phase.selection), ("confirmation", phase.confirmation)):
        for i, section in enumerate(sections):
            again[f"/{at}/{i}/lower_bound"] = contrast.lower_bound(section)
            again[f"/{at}/{i}/explained_variance"] = contrast.heldout(section)
    gain, seeds = None, 0
    if len(phase.confirmation) == 2:
        chosen, control = phase.confirmation
        again |= against("", chosen, control)
        gain, seeds = again["/gain"], len(chosen.members)
    return again | {"/outcome": rules.sparsity_outcome(phase.chosen_k, gain, seeds)}


def assignment_decisions(phase: AssignmentConsistency) -> dict[str, Any]:
    """The gains of every arm, and the acceptance."""
    again: dict[str, Any] = {}
    for i, arm in enumerate(phase.own):
        again |= against(f"/own/{i}", arm, phase.control)
    for i, shared in enumerate(phase.shared):
        mean, left_out = contrast.gain_and_left_out(shared.references, phase.control)
        again |= {f"/shared/{i}/gain": mean, f"/shared/{i}/leave_one_reference_out": left_out}
        for j, section in enumerate(shared.references):
            again |= against(f"/shared/{i}/references/{j}", section, phase.control)
    gain = lost = None
    seeds = 0
    if phase.confirmed:
        control, pulled = phase.confirmed
        again |= against("/confirmation/1", pulled, control)
        gain, lost, seeds = again["/confirmation/1/gain"], again["/confirmation/1/ev_drop"], len(pulled.members)
    return again | {"/acceptance": rules.acceptance(phase.own, gain, lost, seeds, phase.max_ev_drop)}


def against(at: str, section: Compared, control: Compared) -> dict[str, Any]:
    """Gain of an arm, and its loss of explained variance, against its control."""
    return {f"{at}/gain": contrast.gain([section], [control]), f"{at}/ev_drop": contrast.drop(section, control)}


PHASES: dict[str, tuple[type[Strict], Callable[[Any], dict]]] = {
    "4a": (Phase4a, planted.decisions),
    "core_ablations": (CoreAblations, ablation_decisions),
    "adaptive_l0_calibration": (AdaptiveL0, adaptive_decisions),
    "assignment_consistency_v2": (AssignmentConsistency, assignment_decisions),
    "saebench_custom": (Probing, lambda found: {"/conditions": deltas.saebench(found)}),
    "cebench_custom": (Contrastive, lambda found: {"/conditions": deltas.contrastive(found)}),
    "random_model_stress": (RandomModelStress, random_model.decisions),
    "transcoder_stress": (TranscoderStress, transcoder.decisions),
    "ood_stress": (OODStress, drop.decisions),
}
"""Phase -> its schema, and what follows from its figures: place in the results -> value."""


def decisions(results: dict) -> dict[str, Any]:
    """Decisions of a phase, computed again from its sections: place in the results -> value."""
    phase = results.get("phase")
    again: dict[str, Any] = {}

    def of_parts(at: str, bank: Evaluated | Bank) -> None:
        if bank.saebench is not None:
            again[f"{at}/saebench/conditions"] = deltas.saebench(bank.saebench)
        if bank.cebench is not None:
            again[f"{at}/cebench/conditions"] = deltas.contrastive(bank.cebench)
        if bank.code is not None:
            again[f"{at}/code/gain"] = coding.concluded(bank.code).to_json()["gain"]

    def of_bank(at: str, bank: Bank) -> None:
        of_parts(at, bank)
        again[f"{at}/conditions"] = conditions.conditions(bank)

    if phase in PHASES:
        schema, function = PHASES[phase]
        again |= function(schema.model_validate(results))
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
            again["/pareto"] = conditions.pareto(rows)
        else:
            again["/contrasts"] = conditions.contrasts(banks)
            again["/power_laws"] = conditions.power_laws(rows)
    for at, study in studies(results):
        if "convergence" in study:
            moved = Interval.model_validate(study["convergence"]["moved"])
            again[f"{at}/convergence/converged"] = rules.at_rest(moved)
    return again


def phase_problems(results: Any) -> list[str]:
    """Places at which figures and decisions of a phase do not follow from its pairs and members."""
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
    """The value at an RFC 6901 pointer (LookupError where there is none)."""
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
    """Places at which two JSON values differ, numbers up to rounding. The second can be typed evidence."""
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
