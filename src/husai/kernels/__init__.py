"""Sparse products, which take most of a training step: kept entries on numba, Triton or plain PyTorch."""
