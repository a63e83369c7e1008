"""HUSAI: may this claim about a sparse autoencoder be made?"""

__version__ = "0.1.0"
