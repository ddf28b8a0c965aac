"""peft's own methods on vision models: their names, and targets that fit."""
