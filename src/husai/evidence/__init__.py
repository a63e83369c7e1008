"""What results are made of: their types, estimates and rules. Nothing here imports torch."""
