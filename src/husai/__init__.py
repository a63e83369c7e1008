"""HUSAI tests whether evidence supports a claim about sparse autoencoders.

A few lines compare SAEs that differ in their seed, as `scripts/analysis/compare_decoders.py` does:

>>> import husai
>>> from pathlib import Path
>>> from husai.dictionaries.decoders import read_decoder
>>> saes = sorted(Path("assets/husai-tiny-saes").glob("seed*"))
>>> comparison = husai.compare([read_decoder(sae) for sae in saes])
>>> mcc = comparison.scores["mcc"]
>>> print(f"{mcc.estimate:.4f} [{mcc.low:.4f}, {mcc.high:.4f}], random directions {comparison.isotropic['mcc']:.4f}")
0.4894 [0.4772, 0.5016], random directions 0.1663
>>> features = comparison.table()     # one row for each feature of the first SAE, with its recurrence in the other four
>>> features["recurs"].value_counts().sort_index().tolist()
[187, 21, 7, 17, 24]

`husai.compare(decoders, **read_moments(path))` adds the spectral null and a test of each feature. One SAE is enough for
the feature table, because HUSAI trains its siblings:

    reliability = husai.feature_reliability("MY_SAE", "husai-tiny", "blocks.1.hook_resid_pre")
    print(reliability.table.query("statement == 'certified'"))
"""

import importlib
import importlib.util
import os
import sys

__version__ = "0.1.0"
__all__ = ["compare", "feature_reliability"]

# File locks need fcntl, which Windows lacks. The error is raised here, before any work.
if importlib.util.find_spec("fcntl") is None:
    print(f"error: platform: HUSAI runs on Linux and macOS; this is {sys.platform}", file=sys.stderr)
    raise SystemExit(2)

# torch then asks for huge pages, which makes allocations of large tensors faster. torch reads the variable at its first
# allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str):
    """Import the functions for notebooks on first use, because they import torch. No other module uses them."""
    if name == "compare":
        return importlib.import_module("husai.stability.recurrence").compare
    if name == "feature_reliability":
        return importlib.import_module("husai.evals.reliability").feature_reliability
    raise AttributeError(f"module 'husai' has no attribute {name!r}")
