"""Reparameter tuning: changes that fold into the weights."""
