"""Prompt tuning: tokens or pixels added to the input."""
