"""HUSAI: may this claim about a sparse autoencoder be made?"""

import os

__version__ = "0.1.0"

# Lets torch ask for huge pages, which large tensors of a training step are quicker to get from. torch reads it at its
# first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
