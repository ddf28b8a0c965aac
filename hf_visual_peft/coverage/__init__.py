"""The coverage matrix: every registered method on a tiny random model of every architecture."""
