"""Precision, recall, F1 and number of samples of each class."""
