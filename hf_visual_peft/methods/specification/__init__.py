"""Specification tuning: parameters of the backbone itself, or a shift of its biases."""
