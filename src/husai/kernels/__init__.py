"""Sparse products of the kept entries, by numba, Triton or plain PyTorch. They take most of a training step."""
