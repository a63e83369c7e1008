"""What a training step spends its time in: the kept entries of sparse codes, on numba, Triton or plain PyTorch."""
