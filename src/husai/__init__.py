"""HUSAI: may this claim about a sparse autoencoder be made?

import husai
found = husai.compare([a, b, c])      # decoders, arrays [d_sae, d_in]; see husai.stability.recurrence.compare
print(found.scores["mcc"], found.recurrence[0])
"""

import importlib
import importlib.util
import os
import sys

__version__ = "0.1.0"
__all__ = ["compare"]

# File locks come from fcntl, which Windows lacks. The number of usable cores comes from sched_getaffinity, which macOS
# lacks. Either would end in a traceback wherever it is first called.
if importlib.util.find_spec("fcntl") is None or not hasattr(os, "sched_getaffinity"):
    print(f"error: platform: HUSAI runs on Linux; this is {sys.platform}", file=sys.stderr)
    raise SystemExit(2)

# Lets torch ask for huge pages, which large tensors of a training step are quicker to get from. torch reads it at its
# first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str):
    """`husai.compare`, which imports torch, is imported when it is asked for, and by no other module of the package."""
    if name == "compare":
        return importlib.import_module("husai.stability.recurrence").compare
    raise AttributeError(f"module 'husai' has no attribute {name!r}")
