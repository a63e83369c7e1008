"""Stores of rows generated from planted features."""

from __future__ import annotations

from pathlib import Path

from husai.activations.store import StoreWriter
from husai.evidence.rules import PLANTED_HOOK
from husai.evidence.schemas import PlantedRows
from husai.runs.code import code_version
from husai.runs.files import digest, publish_directory
from husai.subjects.planted import Planted, generate


def planted_rows(setting: PlantedRows, root: Path) -> tuple[Path, Planted]:
    """(folder of the store, which is written if missing; its rows with their features and activations).

    Args:
        root: folder of stores. The name of a store is a digest of its inputs.
    """
    planted = generate(setting)
    key = digest({"setting": setting.to_json(), "code": code_version(planted_rows)})
    folder = root / f"planted-{key[:16]}"

    def build(partial: Path) -> None:
        writer = StoreWriter(partial, setting.d_in)
        writer.append(planted.rows)
        writer.finish("planted", setting.digest, PLANTED_HOOK, "0", row_seed=setting.seed, control=None)

    publish_directory(folder, build)
    return folder, planted
