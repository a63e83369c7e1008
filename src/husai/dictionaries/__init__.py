"""SAE families, one file each, and their checkpoints."""
