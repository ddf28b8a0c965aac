"""Macro F1."""
