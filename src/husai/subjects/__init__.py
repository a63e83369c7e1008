"""Subjects: the models whose activations SAEs reconstruct."""
