"""HUSAI: may this claim about a sparse autoencoder be made?

import husai
found = husai.compare([a, b, c])      # decoders, arrays [d_sae, d_in]; see husai.stability.recurrence.compare
print(found.scores["mcc"], found.recurrence[0])

found = husai.feature_reliability("MY_SAE", "husai-tiny", "blocks.1.hook_resid_pre")    # trains siblings
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
