"""Report page, feature page, summaries and plots."""
