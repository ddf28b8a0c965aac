"""Mean per-class accuracy."""
