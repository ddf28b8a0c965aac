"""Top-1 accuracy."""
