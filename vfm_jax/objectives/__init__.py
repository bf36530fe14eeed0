"""Training objectives, one file a family."""
