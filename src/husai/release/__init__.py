"""The verdict on a claim, and the evidence behind it."""
