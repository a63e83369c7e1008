"""External benchmarks and stress tests of groups of SAEs, with matched baselines."""
