"""Prefix tuning: tokens inside attention, as extra keys and values or as extra queries."""
