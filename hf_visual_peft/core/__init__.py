"""The core of the plugin: configs, the registry of methods, and the tuner that puts adapters into models."""
