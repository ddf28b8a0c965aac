"""F1 of samples with several classes."""
