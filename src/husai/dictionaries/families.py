"""The SAE architectures that HUSAI trains, by name."""

from __future__ import annotations

from types import ModuleType

from husai.dictionaries import batchtopk, gated, jumprelu, matryoshka, relu, skip_transcoder, topk, transcoder

FAMILIES: dict[str, ModuleType] = {
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka": matryoshka,
    "relu": relu,
    "jumprelu": jumprelu,
    "gated": gated,
    "transcoder": transcoder,
    "skip_transcoder": skip_transcoder,
}
SAE_FAMILIES = tuple(name for name in FAMILIES if "transcoder" not in name)


def family_of(architecture: str) -> str:
    """Family that trains SAEs of an architecture, in SAELens' name; `topk` where HUSAI trains none like it.

    Several families give `jumprelu`; the one of that name is meant.
    """
    if architecture in SAE_FAMILIES:
        return architecture
    return next((name for name in SAE_FAMILIES if architecture == FAMILIES[name].ARCHITECTURE), "topk")
