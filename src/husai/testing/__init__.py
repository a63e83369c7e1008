"""Simulated and damaged evidence, for benchmarks and tests."""
