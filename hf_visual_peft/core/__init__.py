"""The heart of the plugin: configs, the registry of methods, and the tuner that puts them into models."""
