"""What may be said, and what it rests on."""
