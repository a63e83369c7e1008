"""Compile the CPU kernels for this machine, so that no run waits for it.

    python -m husai.training.compile

numba caches compiled kernels next to the source. `make setup` runs this module; else the first training compiles.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from husai.activations.store import ActivationStore, StoreWriter
from husai.dictionaries.families import FAMILIES
from husai.training.grid import members
from husai.training.trainer import TrainingConfig, evaluate, train

D_IN, D_SAE, K, ROWS = 32, 64, 4, 512


def main() -> None:
    """A few steps of every architecture, with and without proposals by bfloat16 products."""
    rows = torch.randn(2 * ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        (root := Path(folder) / "store").mkdir()
        writer = StoreWriter(root, D_IN)
        writer.append(rows)
        writer.finish("none", "0" * 64, "none", "0", 0, None)
        store = ActivationStore.open(root)
        config = TrainingConfig(tokens=ROWS, batch_size=128, dead_after_tokens=128)
        for name in FAMILIES:
            target = store if "transcoder" in name else None
            for propose in (False, True):
                grid, recipe = members([1, 2], [D_SAE], [K], [1e-3], (name,)), replace(config, propose=propose)
                state = Path(folder) / f"{name}-{propose}"
                trained, _ = train(store, grid, recipe, torch.device("cpu"), state, target=target)
                evaluate(trained[0].sae, store, range(ROWS), target)


if __name__ == "__main__":
    main()
