"""Prefix tuning: tokens inside attention, as further keys and values or as further queries."""
