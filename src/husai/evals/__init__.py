"""Groups of SAEs on external benchmarks and under stress tests, beside matched baselines."""
