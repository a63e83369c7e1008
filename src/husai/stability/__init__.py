"""Matching scores, null baselines, and inference over seeds."""
