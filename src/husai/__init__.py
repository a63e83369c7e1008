"""HUSAI: may this claim about a sparse autoencoder be made?"""

import os

__version__ = "0.1.0"

# torch asks for huge pages for large tensors: a training step's cost less than a quarter to make on a CPU. Read by
# torch at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
