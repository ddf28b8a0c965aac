"""Mean average precision of samples with several classes."""
