"""peft's own methods on vision models: their names, and the targets that they need there."""
