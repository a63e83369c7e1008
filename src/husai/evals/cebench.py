"""CE-Bench's score of SAEs, beside untrained ones, the random-weights model's, and matched references."""

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
    """The results.

    Args:
        pairs: the story pairs; repeats: seed -> other draws of them, for the first SAE alone, the noise.
        summary: results of an earlier run, whose SAEs serve as references beside the SAEs' own
            (`baselines.read_summary`). no_reference: why none shall serve.
        checkout: the user's own CE-Bench, which then runs on each SAE.
    """
    hook_name, opened = loaded.hook_name, loaded.opened
    plain = [baselines.untrained(loaded.store, *untrained_like(c.facts)) for c in opened]
    saes = [*(c.sae for c in opened), *plain]
    found = scored(loaded.subject, hook_name, saes, pairs, places.output_dir)
    of_saes, of_plain = found[: len(opened)], found[len(opened) :]
    controls, of_controls = loaded.control_saes, []
    if loaded.controls is not None:
        random_model = loaded.controls.subject
        of_controls = scored(random_model, hook_name, [c.sae for c in controls], pairs, places.output_dir)
    first = [opened[0].sae]
    again = [scored(loaded.subject, hook_name, first, other, places.output_dir)[0] for other in repeats.values()]
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
        stories_cut=found[0]["stories_cut"],
        clusters=pairs.clusters,
        saes=[
            PairRecord(
                **dict(c.record), **told(f, c.sae.d_sae), checkout=run_checkout(loaded, c, pairs, places, checkout)
            )
            for c, f in zip(opened, of_saes, strict=True)
        ],
        controls=[
            PairControl(**dict(c.record), **told(f, c.sae.d_sae)) for c, f in zip(controls, of_controls, strict=True)
        ],
        untrained=[PairScores(**told(f, sae.d_sae)) for sae, f in zip(plain, of_plain, strict=True)],
        references=references,
        summary_refused=refused,
        no_reference=no_reference,
        conditions=[],
        noise=noise(opened[0].label, [None, *repeats], [of_saes[0], *again], why),
        **loaded.source.record(),
    )
    return results.model_copy(update={"conditions": deltas.contrastive(results)})


def run_checkout(loaded: LoadedSAEs, c: LoadedSAE, pairs: Pairs, places: Places, checkout: Path | None) -> dict | None:
    """What the user's own CE-Bench says of an SAE; None for a reference, or without a checkout."""
    if checkout is None or not c.record.candidate:
        return None
    if departs := loaded.subject.harvesting.to_json():
        log.warning("--cebench-repo: its own code does not run, because it does not apply %s", ", ".join(departs))
        return None
    folder = to_saelens(c.sae, loaded.subject, loaded.hook_name, places.output_dir / "encoders" / c.label)
    work = places.output_dir / "cebench_checkout" / c.label
    return cebench_checkout.run(checkout, loaded.name, None, folder, pairs.rows, work, places.device)


def scored(subject: LanguageModel, hook_name: str, saes: list[SAE], pairs: Pairs, output_dir: Path) -> list[dict]:
    """Scores of each SAE, one a pair, and `normalised`: the corrected interpretability over its bound."""
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


def noise(label: str, seeds: list[int | None], runs: list[dict], reason: str | None) -> PairNoise:
    """How much one SAE's score moves with the draw of pairs (the first is the run's own); not known for a reason."""
    means = [float(f["normalised"].mean()) for f in runs]
    unknown = {"means": means, "sd": None, "minimum_detectable_difference": None}
    spread = unknown if reason else estimates.noise(means)
    return PairNoise(label=label, seeds=seeds, reason=reason, **spread)


def refuse_unreachable(loaded: LoadedSAEs, minimum: float, summary: Summary) -> None:
    """Before anything is computed: raise BadInput for a minimum that no SAE can reach, as the references stand."""
    for group in deltas.by_condition([c.record for c in loaded.saes]).values():
        match = matched(group, summary.references)
        if match.records:
            reference = float(np.mean([r.normalised_of_pairs for r in match.records]))
            contrastive.refuse_unreachable(minimum, reference)
