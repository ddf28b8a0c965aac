"""What is known about a model: its backbone, the roles of its modules, and its task heads."""
