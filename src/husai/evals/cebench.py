"""CE-Bench's score on a lineup of SAEs, beside untrained ones, the random-weights model's, and matched references."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from husai.dictionaries.sae import SAE
from husai.evals import baselines, cebench_checkout, contrastive
from husai.evals.candidates import Lineup, Places, to_saelens
from husai.evals.contrastive import Pairs
from husai.evidence import deltas
from husai.evidence.references import matched, untrained_like
from husai.subjects.pretrained import LanguageModel

REFERENCE = ("condition", "facts", "identity", "normalised_of_pairs")
"""What is kept of a summary's records."""


def evaluate(
    lineup: Lineup,
    pairs: Pairs,
    repeats: dict[int, Pairs],
    places: Places,
    summary: dict | None = None,
    no_reference: str | None = None,
    checkout: Path | None = None,
    subject_name: str | None = None,
) -> dict:
    """The results.

    Args:
        pairs: the story pairs; repeats: seed -> other draws of them, for the first SAE alone, the noise.
        summary: results of an earlier run, whose SAEs serve as references beside the lineup's own
            (`baselines.read_summary`). no_reference: why none shall serve.
        checkout: the user's own CE-Bench, which then runs on each SAE; subject_name: the subject as it was named.
    """
    hook_name, opened = lineup.hook_name, lineup.opened
    plain = [baselines.untrained(lineup.store, *untrained_like(c.facts)) for c in opened]
    saes = [*(c.sae for c in opened), *plain]
    found = scored(lineup.subject, hook_name, saes, pairs, places.output_dir)
    of_saes, of_plain = found[: len(opened)], found[len(opened) :]
    of_controls = []
    if lineup.random_model:
        controls = [c.sae for c in lineup.controls]
        of_controls = scored(lineup.random_model, hook_name, controls, pairs, places.output_dir)
    first = [opened[0].sae]
    again = [scored(lineup.subject, hook_name, first, other, places.output_dir)[0] for other in repeats.values()]
    references, refused = [], None
    if summary is not None and summary["saes"] and summary.get("pairs_digest") != pairs.digest:
        refused = "the baseline summary was made on other story pairs"
    elif summary is not None:
        references = [{k: r[k] for k in REFERENCE} for r in summary["saes"]]

    results = {
        "phase": "cebench_custom",
        "inputs": lineup.inputs() | {"pairs": pairs.digest},
        "subject": lineup.subject.name,
        "subject_digest": lineup.subject.digest,
        "hook_name": hook_name,
        "benchmark": pairs.benchmark,
        "source": pairs.source,
        "pairs_digest": pairs.digest,
        "n_pairs": len(pairs.rows),
        "stories_cut": found[0]["stories_cut"],
        "clusters": pairs.clusters,
        "saes": [r | told(f, r["facts"]["d_sae"]) for r, f in zip(lineup.records(), of_saes, strict=True)],
        "controls": [c.to_json() | told(f, c.sae.d_sae) for c, f in zip(lineup.controls, of_controls, strict=True)],
        "untrained": [told(f, sae.d_sae) for sae, f in zip(plain, of_plain, strict=True)],
        "references": references,
        "summary_refused": refused,
        "no_reference": no_reference,
    }
    results["conditions"] = deltas.contrastive(results)
    drawn = len({p.digest for p in (pairs, *repeats.values())}) == 1 + len(repeats)
    why = None if drawn else "there are no more pairs than are taken: every draw is the same"
    results["noise"] = noise(results["saes"][0], [None, *repeats], [of_saes[0], *again], why)
    for record, c in zip(results["saes"], opened, strict=True):
        record["checkout"] = None
        if checkout and record["candidate"]:
            folder = to_saelens(c.sae, lineup.subject, hook_name, places.output_dir / "encoders" / c.label)
            work = places.output_dir / "cebench_checkout" / c.label
            given = (checkout, subject_name, None, folder, pairs.rows, work, places.device)
            record["checkout"] = cebench_checkout.run(*given)
    return results


def scored(subject: LanguageModel, hook_name: str, saes: list[SAE], pairs: Pairs, output_dir: Path) -> list[dict]:
    """Of each SAE: its scores, one a pair, and `normalised`: the corrected interpretability over its bound."""
    stories = [r["story1"] for r in pairs.rows] + [r["story2"] for r in pairs.rows]
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".means-") as folder:
        means, tokens, cut = contrastive.story_means(subject, hook_name, saes, stories, Path(folder))
        found = [contrastive.scores(mean, tokens) for mean in means]
    for f, sae in zip(found, saes, strict=True):
        f["normalised"] = f["corrected"]["interpretability"] / contrastive.bound(sae.d_sae)
        f["stories_cut"] = cut
    return found


def told(figures: dict, d_sae: int) -> dict:
    """What is kept of an SAE's scores: means, and the normalised score of each pair."""
    means = {v: {s: float(x.mean()) for s, x in figures[v].items()} for v in ("published", "corrected")}
    return means | {
        "bound": contrastive.bound(d_sae),
        "normalised": float(figures["normalised"].mean()),
        "normalised_of_pairs": figures["normalised"].tolist(),
    }


def noise(first: dict, seeds: list[int | None], runs: list[dict], reason: str | None) -> dict:
    """How much one SAE's score moves with the draw of pairs (the first is the run's own); not known for a reason."""
    means = [float(f["normalised"].mean()) for f in runs]
    unknown = {"means": means, "sd": None, "minimum_detectable_difference": None}
    answer = {"label": first["label"], "seeds": seeds, "reason": reason}
    return answer | (unknown if reason else deltas.noise(means))


def refuse_unreachable(lineup: Lineup, minimum: float, summary: dict) -> None:
    """Before anything is computed: raise BadInput for a minimum that no SAE can reach, as the references stand."""
    for group in deltas.by_condition([c.to_json() for c in lineup.saes]).values():
        match = matched(group, summary["saes"])
        if match.records:
            contrastive.refuse_unreachable(minimum, float(np.mean([r["normalised"] for r in match.records])))
