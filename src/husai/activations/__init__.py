"""Harvesting at a hook point, and a sharded, memory-mapped, content-addressed store."""
