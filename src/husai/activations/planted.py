"""Stores of rows that are made of planted features."""

from __future__ import annotations

from pathlib import Path

from husai.activations.store import StoreWriter
from husai.evidence.rules import PLANTED_HOOK
from husai.evidence.schemas import PlantedRows
from husai.runs.code import code_version
from husai.runs.files import digest, publish_directory
from husai.subjects.planted import Planted, generate


def planted_rows(setting: PlantedRows, root: Path) -> tuple[Path, Planted]:
    """(folder of the store, written where it is missing; what its rows are made of).

    Args:
        root: folder below which stores lie; a store's name is the digest of what it is made from.
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
