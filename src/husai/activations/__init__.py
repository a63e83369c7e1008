"""Harvests of activations at a hook, and the store: shards, memory-mapped, named by their content."""
