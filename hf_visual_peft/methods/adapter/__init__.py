"""Adapter tuning: small networks inside or beside the blocks."""
