"""SAE architectures, one file each, and their checkpoints."""
