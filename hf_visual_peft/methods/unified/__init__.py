"""Unified methods: several kinds of equations in one adapter."""
