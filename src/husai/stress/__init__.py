"""What a release candidate must withstand: a meaningless subject, another objective, shifted data."""
