"""The stacked trainer: many SAEs in one pass over the same activations."""
