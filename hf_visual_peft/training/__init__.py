"""Tools for a training loop: groups of parameters, default settings, and interpolation of weights."""
