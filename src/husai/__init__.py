"""HUSAI: may this claim about a sparse autoencoder be made?

Five lines compare SAEs that differ in their seed, as `scripts/analysis/compare_decoders.py` does:

>>> import husai
>>> from pathlib import Path
>>> from husai.dictionaries.decoders import read_decoder
>>> saes = sorted(Path("assets/husai-tiny-saes").glob("seed*"))
>>> found = husai.compare([read_decoder(sae) for sae in saes])
>>> mcc = found.scores["mcc"]
>>> print(f"{mcc.estimate:.4f} [{mcc.low:.4f}, {mcc.high:.4f}], random directions {found.isotropic['mcc']:.4f}")
0.4894 [0.4772, 0.5016], random directions 0.1663
>>> features = found.table()          # a row a feature of the first SAE: in how many of the four others it recurs
>>> features["recurs"].value_counts().sort_index().tolist()
[187, 21, 7, 17, 24]

`husai.compare(decoders, **read_moments(path))` adds the spectral null and a test of each feature. One SAE is enough for
the feature table, because its siblings are trained here:

    found = husai.feature_reliability("MY_SAE", "husai-tiny", "blocks.1.hook_resid_pre")
    print(found.table.query("certified and above_chance"))
"""

import importlib
import importlib.util
import os
import sys

__version__ = "0.1.0"
__all__ = ["compare", "feature_reliability"]

# File locks come from fcntl, which Windows lacks: it would end in a traceback wherever it is first called.
if importlib.util.find_spec("fcntl") is None:
    print(f"error: platform: HUSAI runs on Linux and macOS; this is {sys.platform}", file=sys.stderr)
    raise SystemExit(2)

# Lets torch ask for huge pages, which large tensors of a training step are quicker to get from. torch reads it at its
# first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str):
    """Functions for notebooks, which import torch, are imported when they are asked for, and by no other module."""
    if name == "compare":
        return importlib.import_module("husai.stability.recurrence").compare
    if name == "feature_reliability":
        return importlib.import_module("husai.evals.reliability").feature_reliability
    raise AttributeError(f"module 'husai' has no attribute {name!r}")
