"""The binding of evidence to the SAEs that it is about."""

from __future__ import annotations

from husai.runs.errors import BadInput
from husai.runs.files import digest

OF_ONE_SEED = ("seed", "l0")
"""Facts in which the SAEs of one candidate differ."""


def places(seeds: list[int | None]) -> list[str]:
    """Names of SAEs in evidence: their seeds, or their places if the seeds are not known."""
    return [str(i if seed is None else seed) for i, seed in enumerate(seeds)]


def block(records: list[dict]) -> dict:
    """The identity of a candidate, which evidence names and the gate compares: {"condition", "facts": those that its
    SAEs share, "checkpoints": seed -> sha256 of the weights, "identities": seed -> identity}.

    Args:
        records: of `LoadedSAE.to_json`, of one condition. Where seeds are not known, their place stands for them.

    Raises:
        BadInput: no SAE, SAEs of several conditions, or two of one seed.
    """
    if not records:
        raise BadInput("checkpoint: no SAE of a candidate")
    shared = [{k: v for k, v in r["facts"].items() if k not in OF_ONE_SEED} for r in records]
    if other := next((i for i, facts in enumerate(shared) if facts != shared[0]), None):
        names = [k for k, v in shared[other].items() if shared[0].get(k) != v]
        raise BadInput(
            f"checkpoint: {records[0]['label']} and {records[other]['label']} differ in {', '.join(names)}: SAEs that "
            "differ in their seed alone expected"
        )
    seeds = places([r["facts"]["seed"] for r in records])
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"checkpoint: two SAEs of one seed among {', '.join(seeds)}")
    name = records[0]["condition"] if records[0]["facts"]["source"] == "husai" else f"SAEs ({digest(shared[0])[:6]})"
    return {
        "condition": name,
        "facts": shared[0],
        "checkpoints": dict(zip(seeds, (r["checkpoint_sha256"] for r in records), strict=True)),
        "identities": dict(zip(seeds, (r["identity"] for r in records), strict=True)),
    }
