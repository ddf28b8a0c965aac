"""Confusion matrix."""
