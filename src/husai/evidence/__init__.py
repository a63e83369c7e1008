"""Results: their types, estimates and rules. Nothing here imports torch."""
