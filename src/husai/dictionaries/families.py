"""The SAE families by name."""

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
