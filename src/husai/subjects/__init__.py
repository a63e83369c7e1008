"""The models studied."""
