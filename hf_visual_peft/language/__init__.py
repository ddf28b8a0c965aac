"""Dual encoders of images and texts as classifiers, and methods that adapt them with a few labelled images."""
