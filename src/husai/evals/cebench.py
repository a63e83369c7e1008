"""CE-Bench's score of SAEs, with baselines: untrained SAEs, SAEs of a random-weights model, matched references."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

from husai.dictionaries.sae import SAE
from husai.evals import baselines, cebench_checkout, contrastive
from husai.evals.baselines import Summary
from husai.evals.contrastive import Pairs
from husai.evals.loaded import LoadedSAE, LoadedSAEs, Places, to_saelens
from husai.evidence import deltas, estimates
from husai.evidence.references import matched, untrained_like
from husai.evidence.schemas import Contrastive, PairControl, PairNoise, PairRecord, PairScores
from husai.subjects.pretrained import LanguageModel

log = logging.getLogger("husai")


def evaluate(
    loaded: LoadedSAEs,
    pairs: Pairs,
    repeats: dict[int, Pairs],
    places: Places,
    summary: Summary | None = None,
    no_reference: str | None = None,
    checkout: Path | None = None,
) -> Contrastive:
    """Results of the phase.

    Args:
        pairs: story pairs.
        repeats: seed -> another draw of pairs, on which the first SAE alone is scored, for the noise.
        summary: results of an earlier run, whose SAEs serve as further references (`baselines.read_summary`).
        no_reference: why no reference may serve.
        checkout: folder of the user's own CE-Bench, which then runs on each SAE as well.
    """
    hook_name, opened = loaded.hook_name, loaded.opened
    untrained_saes = [baselines.untrained(loaded.store, *untrained_like(c.facts)) for c in opened]
    saes = [*(c.sae for c in opened), *untrained_saes]
    all_scores = scored(loaded.subject, hook_name, saes, pairs, places.output_dir)
    sae_scores, untrained_scores = all_scores[: len(opened)], all_scores[len(opened) :]
    controls, control_scores = loaded.control_saes, []
    if loaded.controls is not None:
        random_model = loaded.controls.subject
        control_scores = scored(random_model, hook_name, [c.sae for c in controls], pairs, places.output_dir)
    first = [opened[0].sae]
    repeat_scores = [
        scored(loaded.subject, hook_name, first, other, places.output_dir)[0] for other in repeats.values()
    ]
    references, refused = [], None
    if summary is not None and summary.references and summary.pairs_digest != pairs.digest:
        refused = "the baseline summary was made on other story pairs"
    elif summary is not None:
        references = summary.references

    drawn = len({p.digest for p in (pairs, *repeats.values())}) == 1 + len(repeats)
    why = None if drawn else "there are no more pairs than are taken: every draw is the same"
    results = Contrastive(
        phase="cebench_custom",
        inputs=loaded.inputs() | {"pairs": pairs.digest},
        subject=loaded.subject.name,
        subject_digest=loaded.subject.digest,
        hook_name=hook_name,
        benchmark=pairs.benchmark,
        source=pairs.source,
        pairs_digest=pairs.digest,
        n_pairs=len(pairs.rows),
        stories_cut=all_scores[0]["stories_cut"],
        clusters=pairs.clusters,
        saes=[
            PairRecord(
                **dict(c.record),
                **kept_scores(f, c.sae.d_sae),
                checkout=run_checkout(loaded, c, pairs, places, checkout),
            )
            for c, f in zip(opened, sae_scores, strict=True)
        ],
        controls=[
            PairControl(**dict(c.record), **kept_scores(f, c.sae.d_sae))
            for c, f in zip(controls, control_scores, strict=True)
        ],
        untrained=[
            PairScores(**kept_scores(f, sae.d_sae)) for sae, f in zip(untrained_saes, untrained_scores, strict=True)
        ],
        references=references,
        summary_refused=refused,
        no_reference=no_reference,
        conditions=[],
        noise=noise(opened[0].label, [None, *repeats], [sae_scores[0], *repeat_scores], why),
        **loaded.source.record(),
    )
    return results.model_copy(update={"conditions": deltas.contrastive(results)})


def run_checkout(loaded: LoadedSAEs, c: LoadedSAE, pairs: Pairs, places: Places, checkout: Path | None) -> dict | None:
    """Scores of an SAE by the user's own CE-Bench; None for a reference, or without a checkout."""
    if checkout is None or not c.record.candidate:
        return None
    if departs := loaded.subject.harvesting.to_json():
        log.warning("--cebench-repo: its own code does not run, because it does not apply %s", ", ".join(departs))
        return None
    folder = to_saelens(c.sae, loaded.subject, loaded.hook_name, places.output_dir / "encoders" / c.label)
    work = places.output_dir / "cebench_checkout" / c.label
    return cebench_checkout.run(checkout, loaded.name, None, folder, pairs.rows, work, places.device)


def scored(subject: LanguageModel, hook_name: str, saes: list[SAE], pairs: Pairs, output_dir: Path) -> list[dict]:
    """Scores of each SAE, one for each pair. `normalised` is the corrected interpretability over its bound."""
    stories = [r["story1"] for r in pairs.rows] + [r["story2"] for r in pairs.rows]
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".means-") as folder:
        means, tokens, cut = contrastive.story_means(subject, hook_name, saes, stories, Path(folder))
        scores_of_saes = [contrastive.scores(mean, tokens) for mean in means]
    for f, sae in zip(scores_of_saes, saes, strict=True):
        f["normalised"] = f["corrected"]["interpretability"] / contrastive.bound(sae.d_sae)
        f["stories_cut"] = cut
    return scores_of_saes


def kept_scores(figures: dict, d_sae: int) -> dict:
    """Scores of an SAE that results keep: means, and the normalised score of each pair."""
    means = {v: {s: float(x.mean()) for s, x in figures[v].items()} for v in ("published", "corrected")}
    return means | {
        "bound": contrastive.bound(d_sae),
        "normalised": float(figures["normalised"].mean()),
        "normalised_of_pairs": figures["normalised"].tolist(),
    }


def noise(label: str, seeds: list[int | None], runs: list[dict], reason: str | None) -> PairNoise:
    """Spread of one SAE's score over draws of pairs. The first draw is the run's own.

    Args:
        reason: why the spread is unknown; None if it is known.
    """
    means = [float(f["normalised"].mean()) for f in runs]
    unknown = {"means": means, "sd": None, "minimum_detectable_difference": None}
    spread = unknown if reason else estimates.noise(means)
    return PairNoise(label=label, seeds=seeds, reason=reason, **spread)


def refuse_unreachable(loaded: LoadedSAEs, minimum: float, summary: Summary) -> None:
    """Raise BadInput, before anything is computed, for a minimum above the references that no score can reach."""
    for group in deltas.by_condition([c.record for c in loaded.saes]).values():
        match = matched(group, summary.references)
        if match.records:
            reference = float(np.mean([r.normalised_of_pairs for r in match.records]))
            contrastive.refuse_unreachable(minimum, reference)
