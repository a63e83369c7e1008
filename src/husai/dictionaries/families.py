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
    """HUSAI's name of an architecture that SAELens names; `topk` if HUSAI trains no such architecture.

    Several of HUSAI's architectures are `jumprelu` in SAELens; the one of that name is returned.
    """
    if architecture in SAE_FAMILIES:
        return architecture
    return next((name for name in SAE_FAMILIES if architecture == FAMILIES[name].ARCHITECTURE), "topk")
