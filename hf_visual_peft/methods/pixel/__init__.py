"""Prompts at the pixels: learned images around, on or under those that a backbone reads."""
