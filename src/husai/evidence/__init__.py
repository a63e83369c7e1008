"""Types of results, estimates, and rules. No module of this package imports torch."""
