"""External benchmarks: SAEBench, CE-Bench, matched baselines."""
