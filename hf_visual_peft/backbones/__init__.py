"""What is known about a model: its backbone, where its parts are, and its task heads."""
